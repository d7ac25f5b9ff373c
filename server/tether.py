"""The names of common.process for those that still look for them here."""

from common.process import adopt_orphans as adopt_orphans
from common.process import children as children
from common.process import die_with_parent as die_with_parent
from common.process import tethered as tethered
