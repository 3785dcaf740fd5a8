"""Every file name of a study and of a training, once: what lies where, for people and for the code.

    study/
      manifest.json      its id, and a note of its ledger
      resolved.yaml      the complete recipe of the last search, for people
      log/               numbered commits, the only state of the search, its recipe among it (``store.log``)
      stop               asks the driver to end: running trainings write a checkpoint
      requests/          of a study in a bucket: the same from any machine, by the number of the driver's claim
      shared_images.csv  images that stand in two roles, and what was done
      best.yaml, figure.png, figure.svg, report.html, ray.log
      prepared/          what all trainings share
      trials/NAME/, baselines/NAME/, confirm/NAME/, soups/NAME/     log, metrics, TensorBoard's events
        attempt-N/       what one attempt writes: epochs, checkpoints, weights, predictions, and result.json, last
      tracking/          what Weights & Biases or MLflow keep, where they keep it here
      test/              what reads of the test sets have found

A study in a bucket has the same names below its address (`study.place`).
The folder of `train` is a study of one trial, trials/train/.
"""

# of a study
MANIFEST = "manifest.json"
RESOLVED = "resolved.yaml"
COMMITS = "log"
STOP = "stop"
STOP_REQUESTS = "requests"
SHARED_IMAGES = "shared_images.csv"
BEST = "best.yaml"
FIGURE_PNG = "figure.png"
FIGURE_SVG = "figure.svg"
PAGE = "report.html"
RAY_LOG = "ray.log"
PREPARED = "prepared"
FOLDERS = {"trial": "trials", "baseline": "baselines", "confirm": "confirm", "soup": "soups"}  # of trainings, by kind
CONFIRM = FOLDERS["confirm"]
SOUPS = FOLDERS["soup"]  # means of the weights of other trainings
TEST_DIR = "test"
TRACKING = "tracking"

# of confirm/ and test/
CONFIRM_PLAN = "plan.json"
SUMMARY = "summary.json"

# of prepared/
PREPARATION = "prepared.json"  # what it belongs to, written last
HEADS = "heads.safetensors"
ZERO_SHOT_TABLE = "zero_shot.parquet"
SETS = "sets"  # as they were listed

# of a training
RESULT = "result.json"
LOG = "log.txt"
METRICS = "metrics.jsonl"  # a line per epoch
WEIGHTS = "fine_tuned.safetensors"  # of the fine-tuned model; only those of the best trials stay
ATTEMPT = "attempt-"  # begins the name of the folder with what one attempt writes: ``attempt-2``
STEP = "step-"  # begins the name of a checkpoint's folder in it
STATE = "state.json"  # in a checkpoint's folder; in a bucket it comes last: without it, a checkpoint is not whole
KEPT_CHECKPOINTS = 2  # newest ones, while a training runs: if the last is damaged, the one before it serves
OWN = "own"  # in it, too: what a fine-tuning of the user's own keeps
ROWS = "rows.jsonl"  # in it, too, while a training has not ended: what the attempt has reported, a line per epoch
PREDICTIONS = "predictions/validation.parquet"
THUMBNAILS = "predictions/thumbnails.parquet"  # of images whose answers change; they go with the weights
OF_RESULT = (WEIGHTS, PREDICTIONS)  # files whose size and hash a result has
