"""Speed of bootstrap intervals over patients: 25,596 images, 14 findings, 2,797 patients, 1,000 resamples.

That is the size of the test set of ChestX-ray14. The loop that everybody writes first calls scikit-learn once a resample and finding, with
the resample as weights; it runs for `--resamples` resamples and is scaled to 1,000. Scores are random, findings as common as in
ChestX-ray14. Memory is the largest of the whole process, torch and Python included, taken before scikit-learn's loop.
"""
import resource, sys, time
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from benchmarks import Bench, arguments, busy, timed
from c2l_nb.evaluation.metrics import auroc, average_precision, bootstrap, patient_counts, score_table

N,PATIENTS,R = 25_596,2_797,1_000
SHARES = [.103,.025,.119,.177,.052,.056,.013,.047,.042,.021,.022,.015,.030,.002]     # images with the finding, of 112,120

def data():
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(N,len(SHARES), generator=g) < torch.tensor(SHARES)).double()
    return y, torch.rand(N,len(SHARES), generator=g).double()+.1*y, torch.randint(PATIENTS,(N,), generator=g)

def loop(stat, y, p, counts, patient):
    "One call of scikit-learn a resample and finding"
    return [[stat(a,b, sample_weight=w) for a,b in zip(y.T.numpy(), p.T.numpy())] for w in counts[:,patient].double().numpy()]

def tables(bench, y, p, who):
    "Both tables whole, and the most memory that the process ever held"
    def both(): return [score_table(y, p, who, n_boot=R, stat=s) for s in (auroc,average_precision)]
    void,clock = busy()>.1, time.process_time if bench.cpu else time.perf_counter
    torch.set_num_threads(bench.threads)
    seconds = timed(both, clock)
    bench.add('AUROC and AP, 25,596 × 14 × 1,000 resamples: seconds', seconds, '<= 60', void, threads=bench.threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform=='darwin' else 1024)
    bench.add('the same, largest memory of the process: GB', peak/1e9, '<= 2', unit='GB')

def ratios(bench, y, p, who, resamples):
    "scikit-learn's loop on some resamples, scaled to all ÷ ours on all"
    counts,patient = patient_counts(who, N, R)
    for ours,theirs in ((auroc,roc_auc_score), (average_precision,average_precision_score)):
        want = torch.tensor(loop(theirs, y, p, counts[:1], patient), dtype=torch.float64)
        error = (want-bootstrap(y, p, counts[:1], patient, ours)).abs().max()
        assert error<1e-12, f'{ours.__name__} differs from scikit-learn by {error}'
        void,clock = busy()>.1, time.process_time if bench.cpu else time.perf_counter
        pairs = []
        for _ in range(bench.pairs):
            slow = timed(lambda: loop(theirs, y, p, counts[:resamples], patient), clock)*R/resamples
            pairs.append([round(t,3) for t in (slow, timed(lambda: bootstrap(y, p, counts, patient, ours), clock))])
        middle = sorted(a/b for a,b in pairs)[len(pairs)//2]
        bench.add(f'{ours.__name__}: loop over scikit-learn ÷ ours', middle, '>= 20', void, pairs=pairs, threads=bench.threads)

if __name__=='__main__':
    p = arguments(__doc__)
    p.add_argument('--resamples', type=int, default=3, help="of scikit-learn's loop, scaled to 1,000 (default 3)")
    args = p.parse_args()
    bench,made = Bench(args.pairs, args.threads, args.cpu), data()
    tables(bench, *made)
    ratios(bench, *made, args.resamples)
    if args.save: bench.save(args.save, 'python tests/bench/bench_metrics.py')
