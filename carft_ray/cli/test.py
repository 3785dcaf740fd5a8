"""The one command that reads the test sets."""

from typing import Annotated

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console


@command("test studies/quickstart", common.TRUST)
def evaluate_test_sets(
    study: common.StudyArgument,
    again: Annotated[
        str | None, Option(metavar="REASON", help="Read them again; ledger and reports show the reason.")
    ] = None,
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Read the test sets once: measure winner and baselines on id_test and ood_test. The ledger records every read."""
    from carft_ray.data.copies.shared_images import read_shared, shared_lines
    from carft_ray.results.test_sets.sealed_read import read_sealed
    from carft_ray.results.test_sets.summary import read_lines
    from carft_ray.store.copy import MODELS
    from carft_ray.study.place import named, own_folder

    step = f"Resume with: {common.command_line('test', study, trust_paths=trust_paths)}"
    with common.interrupted_as("stopped; the results so far are kept", step):
        folder = own_folder(study, MODELS)
        summary = read_sealed(folder, again, console.sayer(not json_), trust_paths)
    if console.print_json({"study": named(folder.resolve()), **summary}, json_):
        return
    ood_sets = [name for name in summary["sets"] if name != "id_test"]
    console.show(console.estimate_table(summary["rows"], ood_sets, "test sets, %"))
    console.say("\n" + "\n".join([*shared_lines(read_shared(folder)), *read_lines(summary)]))
    console.say(f"Results: {folder / 'test' / 'read-'}{summary['read']}")
    common.suggest(study, "test", changed=True)
