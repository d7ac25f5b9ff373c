"""The names of common.files for those that still look for them here."""

from common.files import LockedError as LockedError
from common.files import hold as hold
from common.files import is_held as is_held
