"""The fixed parts of a run's report: the privacy statement and the style sheet."""

from common import charts

PRIVACY = """\
<dl class="promise">
<dt>Unit</dt>
<dd>One record of a partition. Two data sets are neighbours when one is the other with one record added or
removed.</dd>
<dt>Guarantee</dt>
<dd>Everything that a partition has ever sent is (epsilon, delta)-differentially private, with epsilon at most
the partition's budget at its delta, whatever the server and the other partitions do and whenever training
stops. Epsilon spent is what has been used of that budget so far.</dd>
<dt>Mechanism</dt>
<dd>DP-SGD (<cite>Abadi et al. 2016, arXiv:1607.00133</cite>): each record joins a batch independently with a
public probability, its gradient is clipped in the L2 norm, and Gaussian noise is added to the sum. The
Poisson-sampled Gaussian steps are composed per partition, and a round is paid for before its first record is
read.</dd>
<dt>Budget</dt>
<dd>It belongs to the data, not to this run: it lives in the client's own ledger and is used up over all runs.
The figures on this page are those that the clients reported; what counts is the ledger, which its owner reads
with <code>python -m client.ledger show</code>, and what the partitions have signed.</dd>
<dt>Not covered</dt>
<dd><ul>
<li>That a partition takes part, and in which rounds.</li>
<li>A person with several records, in one partition or in several: what they lose adds up.</li>
<li>Side channels and timing, and whoever can read the client's machine.</li>
<li>The noised update of each partition: the server sees every one of them, not only their average. They are
what the guarantee is about; nothing more is hidden from the server.</li>
</ul></dd>
</dl>"""

STYLE = (
    charts.COLOURS
    + charts.STYLE
    + """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header p { margin: 0; color: var(--soft); }
h1 { margin: .1rem 0 .2rem; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .6rem; font-size: 1.2rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 2rem;
  margin: 1.6rem 0 0; }
.facts div { padding: .6rem 0; border-top: 1px solid var(--rule); }
.facts dt { color: var(--soft); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.promise { display: grid; grid-template-columns: 7rem 1fr; gap: .7rem 1rem; max-width: 50rem; margin: 0; }
.promise dt { font-weight: 600; }
.promise dd, .promise ul { margin: 0; }
table + .promise { margin-top: 1.2rem; }
.promise ul { padding-left: 1.1rem; }
section { overflow-x: auto; }
pre { padding: .6rem .8rem; border: 1px solid var(--rule); overflow-x: auto; font-size: .85rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; text-align: left; color: var(--soft); }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: baseline; }
th { font-weight: 600; }
tbody th { font-weight: 400; overflow-wrap: anywhere; }
.bar { display: inline-block; width: 5rem; height: .45rem; margin-left: .6rem; border-radius: .3rem;
  background: var(--rule); overflow: hidden; print-color-adjust: exact; }
.bar i { display: block; height: 100%; background: var(--bar); print-color-adjust: exact; }
@media (max-width: 40rem) {
  .promise { grid-template-columns: 1fr; gap: .1rem; }
  .promise dd { margin-bottom: .8rem; }
}
@media print {
  :root { --paper: #fff; font-size: 12px; }
  main { max-width: none; padding: 0; }
  section { overflow: visible; }
  h2, caption, thead { break-after: avoid; }
  svg, tr, .facts, .promise dd { break-inside: avoid; }
}
"""
)
