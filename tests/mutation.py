"""The mutation score of a module: which small changes to its code do the tests notice?

    python tests/mutation.py synthetic.trainer --sample 60    a seeded random sample of a module's mutants
    python tests/mutation.py all --sample 60                the same of every module in TESTS
    python tests/mutation.py synthetic.trainer --report       what is known so far, survivors with their diffs

mutmut (pip install mutmut) makes and runs the mutants, in a copy of the tree below --work; this file says
which tests concern which module, samples, and adds up. It resumes: mutants that have a verdict are not run
again as long as neither their module nor its tests have changed. mutmut leaves alone what stands outside
functions and below decorators other than staticmethod and classmethod.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ssm_retrieval", "synthetic", "probes", "analysis", "benchmarks", "studies", "vlm")
CLI = "import sys; from mutmut.__main__ import cli; sys.argv[0] = 'mutmut'; cli()"
KILLED, SURVIVED, UNTESTED = "killed", "survived", "no test runs it"

_TASKS = ["test_tasks", "test_tasks_distributions", "test_tasks_family", "test_tasks_split"]
TESTS: dict[str, list[str]] = {
    "synthetic.trainer": [
        "test_session", "test_golden", "test_run", "test_memory", "test_tasks_training", "test_evaluate",
        "test_stopping", "test_run_init", "test_records", "test_shares", "test_trainer",
    ],
    "ssm_retrieval.training.session": [
        "test_trainer", "test_session", "test_golden", "test_stopping", "test_shares",
    ],
    "ssm_retrieval.training.optimizers": [
        "test_session", "test_golden", "test_memory", "test_run", "test_planning", "test_optional_packages",
    ],
    "synthetic.evaluate": ["test_session", "test_evaluate", "test_tasks_training", "test_tasks_split"],
    "synthetic.tasks.base": [*_TASKS, "test_tasks_training"],
    "synthetic.tasks.grid": _TASKS,
    "synthetic.tasks.induction": [*_TASKS, "test_tasks_training"],
    "synthetic.tasks.layouts": _TASKS,
    "synthetic.tasks.mqar": _TASKS,
    "synthetic.tasks.ngram": [*_TASKS, "test_tasks_original"],
    "synthetic.tasks.original": ["test_tasks_original"],
    "synthetic.tasks.position": [*_TASKS, "test_tasks_original"],
    "synthetic.tasks.sampling": _TASKS,
    "synthetic.tasks.selective_copy": [*_TASKS, "test_tasks_training"],
    "ssm_retrieval.statistics.factorial": ["test_factorial"],
    "ssm_retrieval.statistics.intervals": ["test_statistics", "test_evaluate"],
    "ssm_retrieval.statistics.paired": ["test_statistics"],
    "ssm_retrieval.statistics.seeds": ["test_seeds"],
    "ssm_retrieval.statistics.survival": ["test_statistics", "test_interval_censoring"],
    "vlm.metrics.anls": ["test_vlm_metrics"],
    "vlm.metrics.boxes": ["test_vlm_metrics"],
    "vlm.metrics.captions": ["test_vlm_metrics"],
    "vlm.metrics.choices": ["test_vlm_metrics"],
    "vlm.metrics.objects": ["test_vlm_metrics"],
    "vlm.metrics.released": ["test_vlm_metrics"],
    "vlm.metrics.vqa": ["test_vlm_metrics", "test_vlm_datasets"],
    "probes.ablation": ["test_hooks_edits", "test_patching", "test_probes_run", "test_ablation_sets"],
    "probes.cache": ["test_hooks", "test_hook_names", "test_recordings", "test_hooks_edits"],
    "probes.patch_cells": ["test_pairs"],
    "probes.heads": ["test_probe_heads"],
    "probes.extrapolation": ["test_extrapolation"],
    "probes.hooks": ["test_hooks", "test_hook_names", "test_hooks_edits"],
    "probes.lens": ["test_probe_heads"],
    "probes.linear": ["test_probe_linear"],
    "probes.linear_maps": ["test_probe_linear"],
    "probes.names": ["test_hook_names"],
    "probes.contrast_pairs": ["test_pairs"],
    "probes.patch_effects": ["test_patching", "test_probe_heads"],
    "probes.patching": ["test_patching"],
    "probes.projection": ["test_projection"],
    "probes.readout": ["test_probe_capacity"],
    "probes.retention": ["test_probe_retention"],
    "probes.scan": ["test_probe_updates", "test_probe_retention"],
    "probes.token_roles": ["test_pairs"],
    "probes.run": ["test_probes_run"],
    "probes.patch_sites": ["test_patching", "test_hybrid"],
    "probes.updates": ["test_probe_updates", "test_probe_retention"],
}  # fmt: skip


class Tree:
    """A copy of the tracked tree for one module's mutants, made anew when the module or its tests change."""

    def __init__(self, module: str, work: Path):
        self.module, self.folder = module, work / module
        self.path = Path(*module.split(".")).with_suffix(".py")
        found = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
        self.tests = [str(found[name].relative_to(ROOT)) for name in TESTS[module]]

    def prepare(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        helpers = [name for name in listed if name.startswith("tests/") and "/test_" not in name]
        digest = hashlib.sha256()
        for path in (str(self.path), *self.tests, *helpers):
            digest.update((ROOT / path).read_bytes())
        stamp = self.folder / "stamp"
        if stamp.exists() and stamp.read_text() == digest.hexdigest():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        if (shared := ROOT.parent / "shared").exists():
            (self.folder / "shared").symlink_to(shared)
        others = [p.name for p in self.folder.iterdir() if p.name not in (*PACKAGES, "tests", "shared")]
        settings = {
            "source_paths": list(PACKAGES),
            "only_mutate": [str(self.path)],
            "also_copy": others,
            "pytest_add_cli_args_test_selection": self.tests,
            "pytest_add_cli_args": ["-p", "no:cacheprovider", "-m", "not slow", "-n", "0"],
            # torch and numba have threads, which a fork of the process that ran them would wait for forever
            "process_isolation": "forkserver",
            "use_git_change_detection": False,
            "timeout_multiplier": 6.0,
            "timeout_constant": 10.0,
        }
        lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
        with open(self.folder / "pyproject.toml", "a", encoding="utf-8") as file:
            file.write(f"\n[tool.mutmut]\n{lines}\n")
        stamp.write_text(digest.hexdigest())

    def mutants(self) -> list[str]:
        """Names of all mutants, in order."""
        found = self.mutmut_python(
            "import sys, pathlib\n"
            "from mutmut.mutation.file_mutation import mutate_file_contents\n"
            "from mutmut.utils.format_utils import get_mutant_name\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "for name in mutate_file_contents(str(path), path.read_text()).mutant_names:\n"
            "    print(get_mutant_name(path, name))",
            str(self.path),
        )
        return found.split()

    def known(self) -> dict[str, str]:
        """Verdict of every mutant that has been run."""
        meta = self.folder / "mutants" / f"{self.path}.meta"
        if not meta.exists():
            return {}
        codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
        verdicts = {0: SURVIVED, 5: UNTESTED, 33: UNTESTED}
        return {name: verdicts.get(code, KILLED) for name, code in codes.items() if code is not None}

    def run(self, names: list[str]) -> None:
        """Run mutants; its own words go to mutmut.log in the tree."""
        with open(self.folder / "mutmut.log", "a", encoding="utf-8") as log:
            command = [sys.executable, "-c", CLI, "run", "--max-children", "1", *names]
            status = subprocess.run(command, cwd=self.folder, env=quiet(), stdout=log, stderr=log).returncode
        if status:
            raise SystemExit(f"mutmut ended with status {status}; read {self.folder / 'mutmut.log'}")

    def diff(self, name: str) -> str:
        return self.mutmut_python(CLI, "show", name)

    def mutmut_python(self, program: str, *argv: str) -> str:
        command = [sys.executable, "-c", program, *argv]
        done = subprocess.run(command, cwd=self.folder, env=quiet(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return done.stdout


def quiet() -> dict[str, str]:
    """The environment of mutants: one thread each, and no tree but their own to import from."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | one | {"MPLBACKEND": "Agg"}


def report(tree: Tree, chosen: list[str], total: int) -> str:
    """One line of docs/testing.md's table, then the mutants among `chosen` that nobody noticed."""
    from ssm_retrieval.statistics import wilson

    known = tree.known()
    verdicts = {name: known[name] for name in chosen if name in known}
    killed = sum(v == KILLED for v in verdicts.values())
    low, high = wilson(killed, len(verdicts))
    share = f"{100 * killed / len(verdicts):.0f} %" if verdicts else "-"
    lines = [
        f"| `{tree.module}` | {total} | {len(verdicts)} | {killed} | {share} "
        f"| {100 * low:.0f} to {100 * high:.0f} |"
    ]
    for name, verdict in verdicts.items():
        if verdict != KILLED:
            lines += ["", f"{name}: {verdict}", tree.diff(name).rstrip()]
    return "\n".join(lines)


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("module", choices=[*TESTS, "all"], metavar="MODULE", help="a dotted name, or all")
    parser.add_argument("--sample", type=int, default=60, help="mutants of a module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; larger samples contain smaller")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutation", help="folder of the copies")
    options = parser.parse_args()
    print("| module | mutants | run | killed | score | 95 % interval |\n|---|---|---|---|---|---|")
    for module in TESTS if options.module == "all" else [options.module]:
        tree = Tree(module, options.work.resolve())
        tree.prepare()
        names = tree.mutants()
        # an order, so that a larger sample goes on where a smaller one has stopped
        chosen = random.Random(options.seed).sample(names, len(names))[: options.sample or len(names)]
        known = tree.known()
        if not options.report and (missing := [name for name in chosen if name not in known]):
            tree.run(missing)
        print(report(tree, chosen, len(names)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
