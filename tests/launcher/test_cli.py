"""The command line as people meet it: what it prints, its exit statuses, what it leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launcher.recipe
from launcher.rundir import RunDir, write_json

LAUNCH = [sys.executable, "-m", "launcher.cli"]
TRAIN = """\
import json, os, pathlib, sys
run = pathlib.Path(os.environ["LAUNCH_RUN_DIR"])
who = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
print("hello from", who, sys.argv[1:], os.environ["GREETING"])
if os.environ["RANK"] == "0":
    (run / "seen.json").write_text(json.dumps(dict(os.environ)))
sys.exit(int(os.environ.get("EXIT", 0)))
"""
CHECK = """\
import json, sys
asked = json.load(sys.stdin)
problems, notes = [], [f"{asked['resources']['gpus']} workers"]
lr = asked["train"].get("lr")
if not isinstance(lr, (int, float)):
    problems.append({"loc": ["train", "lr"], "message": "`train.lr` must be a number", "kind": "recipe"})
for key in asked["train"]:
    if key not in ("lr", "root"):
        wrong = {"loc": ["train", key], "message": f"`train.{key}` is unknown", "known": ["lr", "root"]}
        problems.append(wrong | {"kind": "recipe"})
if asked["train"].get("root"):
    problems.append({"loc": ["train", "root"], "message": "no such data set here", "kind": "machine"})
print(json.dumps({"problems": problems, "notes": notes}))
"""
RECIPE = """\
program: {script: train.py, args: [--flag, a b]}
resources: {gpus: 2, device: cpu}
restart: {crashes: 0, grace: 5s}
env: {vars: {GREETING: "it's $HOME; `x`"}}
train:
  lr: 0.1
"""
CHECKED = RECIPE.replace(
    "{script: train.py, args: [--flag, a b]}", "{module: trainer.main, check: trainer.check}"
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer" / "check.py").write_text(CHECK)
    (folder / "trainer" / "main.py").write_text(TRAIN)
    (folder / "train.py").write_text(TRAIN)
    (folder / "toy.yaml").write_text(RECIPE)
    (folder / "checked.yaml").write_text(CHECKED)
    monkeypatch.chdir(folder)
    return folder


def launch(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*LAUNCH, *argv],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def runs() -> list[Path]:
    root = Path(os.environ["LAUNCH_RUNS"])
    return sorted(root.iterdir()) if root.exists() else []


def test_a_plain_script_from_recipe_to_its_end() -> None:
    done = launch(
        "toy.yaml",
        "--backend",
        "local",
        "--name",
        "first",
        AWS_SECRET_ACCESS_KEY="hunter2",
        AWS_PROFILE="lab",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (folder,) = runs()
    run = RunDir(folder)
    assert run.name == "first"
    record = json.loads(run.run.read_text())
    assert record["env"]["AWS_PROFILE"] == "lab" and record["recipe"] == "toy.yaml" and record["url"] is None
    told = launch("status", "first")
    assert "finished" in told.stdout and "toy.yaml" in told.stdout
    (row,) = (json.loads(launch("status", "--json").stdout)["runs"],)
    assert row[0]["state"] == "finished" and row[0]["id"] == folder.name
    said = launch("logs", "last").stdout
    assert "hello from rank 0 of 2 ['--flag', 'a b'] it's $HOME; `x`" in said
    assert "hello from rank 1" in launch("logs", "first", "--rank", "1").stdout
    assert "hello from rank 0" in launch("logs", "first", "-f").stdout
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "seen.json":
            assert "hunter2" not in file.read_text(errors="replace"), file
    assert launch("resume", "last").returncode == 2
    assert launch("stop", "last").returncode == 2
    assert launch("rm", "first").returncode == 0
    assert runs() == []


def test_a_run_that_fails_exits_with_1() -> None:
    done = launch("toy.yaml", "--backend", "local", "env.vars.EXIT=3")
    assert done.returncode == 1
    (row,) = json.loads(launch("status", "--json").stdout)["runs"]
    assert row["state"] == "failed" and row["attempts"] == 1


def test_a_dry_run_shows_what_would_be_run_and_leaves_nothing() -> None:
    told = launch("toy.yaml", "--gpus", "3", "--dry-run", "--backend", "local")
    assert told.returncode == 0, told.stderr
    for words in (
        "--nproc-per-node=3",
        "--max-restarts=0",
        "train.py --flag 'a b'",
        "3 CPU workers",
        "lr: 0.1",
    ):
        assert words in " ".join(told.stdout.replace("\\\n", " ").split())
    plan = json.loads(launch("toy.yaml", "--dry-run", "--json", "--backend", "local").stdout)
    assert plan["recipe"]["resources"]["gpus"] == 2 and "--nproc-per-node=2" in plan["command"]
    assert plan["env"]["GREETING"] == "it's $HOME; `x`" and plan["run"]["url"] is None
    assert runs() == []


def test_freezing_resolves_all_that_the_recipe_says() -> None:
    Path("child.yaml").write_text("extends: toy.yaml\ntrain: {extra: 1e-3}\n")
    frozen = launch("child.yaml", "--freeze", "train.lr=3", "--gpus", "4").stdout
    Path("frozen.yaml").write_text(frozen)
    plan = json.loads(launch("frozen.yaml", "--dry-run", "--json", "--backend", "local").stdout)
    assert plan["recipe"]["train"] == {"lr": 3, "extra": 0.001} and plan["recipe"]["resources"]["gpus"] == 4


def test_the_programs_own_check_speaks_with_file_line_and_column() -> None:
    wrong = launch("checked.yaml", "train.lrr=1", "--dry-run", "--backend", "local")
    assert wrong.returncode == 2
    assert (
        wrong.stderr
        == "launch: train.lrr=1 on the command line: `train.lrr` is unknown; did you mean `lr`?\n"
    )
    Path("child.yaml").write_text("extends: checked.yaml\ntrain:\n  lr: fast\n")
    assert (
        "child.yaml:3:7: `train.lr` must be a number\n      lr: fast\n          ^"
        in launch("child.yaml").stderr
    )
    assert "note: 2 workers" in launch("checked.yaml", "--dry-run", "--backend", "local").stderr


def test_what_only_this_machine_lacks_is_a_warning_until_it_runs() -> None:
    argv = ["checked.yaml", "train.root=/nowhere", "--backend", "local"]
    dry = launch(*argv, "--dry-run")
    assert (
        dry.returncode == 0
        and "warning: train.root=/nowhere on the command line: no such data set" in dry.stderr
    )
    refused = launch(*argv)
    assert refused.returncode == 2 and "no such data set here" in refused.stderr and runs() == []
    argv = ["toy.yaml", "resources.device=cuda", "resources.gpus=64", "--backend", "local"]
    assert "GPU" in launch(*argv, "--dry-run").stderr
    refused = launch(*argv)
    assert refused.returncode == 2 and "the recipe asks for 64" in refused.stderr and runs() == []


def test_validate_checks_all_that_it_is_given() -> None:
    Path("bad.yaml").write_text("extends: toy.yaml\nresources: {gpu: 1}\n")
    done = launch("validate", "toy.yaml", "bad.yaml", "checked.yaml")
    assert done.returncode == 2
    assert (
        "toy.yaml: good" in done.stdout
        and "checked.yaml: good" in done.stdout
        and "bad.yaml:2:13" in done.stderr
    )
    assert launch("validate", "toy.yaml").returncode == 0 and runs() == []


def test_validate_says_once_what_is_wrong_with_a_base() -> None:
    Path("base.yaml").write_text("extends: toy.yaml\nresources: {device: cuda, gpus: 64}\n")
    for name in ("one.yaml", "other.yaml"):
        Path(name).write_text("extends: base.yaml\n")
    done = launch("validate", "one.yaml", "other.yaml")
    assert done.returncode == 0 and done.stdout.count(": good") == 2
    assert done.stderr.count("the recipe asks for 64") == 1


BAD = {
    "no recipe": (["nowhere.yaml"], "nowhere.yaml: there is no such recipe"),
    "a misspelt verb": (["statsu"], "did you mean `launch status`?"),
    "an unknown option": (["toy.yaml", "--gpu", "3"], "--gpu"),
    "no number": (["toy.yaml", "--gpus", "many"], "many"),
    "no GPUs": (["toy.yaml", "--gpus", "0"], "0"),
    "an unknown key": (["toy.yaml", "resources.gpu=3"], "did you mean `gpus`?"),
    "a key that is not there": (["toy.yaml", "train.lrate=3"], "`train.lrate` is not in the recipe"),
    "a wrong type": (["toy.yaml", "resources.gpus=x"], "must be a whole number"),
    "too few": (["toy.yaml", "resources.min_gpus=4", "--gpus", "3"], "--gpus 3: 3 workers are too few"),
    "an unknown backend": (["toy.yaml", "--backend", "pbs"], "pbs"),
    "a name that leaves its folder": (["toy.yaml", "--name", "../x"], "cannot name a run"),
    "more nodes": (["toy.yaml", "--nodes", "2"], "runs on one machine"),
    "no script": (["toy.yaml", "program.script=gone.py"], "there is no script gone.py"),
    "no module": (["toy.yaml", "program={module: gone.train, script: null}"], "no module gone.train"),
    "no check": (["checked.yaml", "program.check=gone.check"], "no module gone.check"),
    "a broken check": (
        ["checked.yaml", "program.check=trainer.main"],
        "trainer.main --check could not answer",
    ),
    "a base on the command line": (["toy.yaml", "extends=x.yaml"], "`extends` belongs into the recipe"),
    "an override without a key": (["toy.yaml", "=3"], "an override looks like section.key=value"),
    "a section that is none": (["toy.yaml", "train=3"], "`train` must hold `key: value` lines"),
    "bytes that are no text": (["toy.yaml", os.fsdecode(b"train.lr=\xff")], "not YAML"),
    "a file that is no text": (["/bin/true"], "not UTF-8"),
    "a store that is none": (["toy.yaml", "storage.url=ftp://x/y"], "not the address of a store"),
    "an unknown run": (["status", "nobody"], "there are no runs"),
    "no runs to stop": (["stop", "last"], "there are no runs"),
    "no such shell": (["completion", "tcsh"], "tcsh"),
    "no such run in a folder": (["resume", "file:///nowhere/x-20260101-000000-0000"], "no run"),
    "nothing to validate": (["validate"], "RECIPE"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_clear_sentence(argv: list[str], said: str) -> None:
    done = launch(
        *argv, *(["--backend", "local"] if argv[0].endswith(".yaml") and "--backend" not in argv else [])
    )
    assert done.returncode == 2, done
    assert said in done.stderr and done.stdout == ""
    assert runs() == []


def test_a_folder_that_cannot_be_written_is_told() -> None:
    Path("file").write_text("")
    done = launch("toy.yaml", "--backend", "local", LAUNCH_RUNS=str(Path("file/runs").absolute()))
    assert done.returncode == 2 and "cannot make a run folder" in done.stderr


def test_a_disk_that_is_full_leaves_nothing_half_done() -> None:
    """A limit of 0 on the size of files fails every write, as a full disk does."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    program = f"{limit}; from launcher.cli.main import main; main()"
    argv = [sys.executable, "-c", program, "toy.yaml", "--backend", "local"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cannot make a run folder" in done.stderr and runs() == []


def test_without_tmux() -> None:
    assert json.loads(launch("toy.yaml", "--json", PATH="/nowhere").stdout)["run"]["backend"] == "local"
    done = launch("toy.yaml", "--backend", "tmux", PATH="/nowhere")
    assert done.returncode == 2 and "there is no tmux here" in done.stderr and runs() == []


def test_without_slurm() -> None:
    """Nothing is submitted; what would be, a dry run shows all the same."""
    done = launch("toy.yaml", "--backend", "slurm", PATH="/nowhere")
    assert done.returncode == 2 and "no submit host" in done.stderr and runs() == []
    dry = launch("toy.yaml", "--backend", "slurm", "--dry-run", PATH="/nowhere")
    assert dry.returncode == 0 and "warning: there is no sbatch here" in dry.stderr
    assert "#SBATCH --nodes=1" in dry.stdout and not Path("runs").exists()


def test_credentials_that_a_window_would_not_see_are_refused() -> None:
    secret = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        secret[name] = ""
    done = launch("toy.yaml", "--backend", "tmux", "storage.url=s3://bucket/x", **secret)
    assert done.returncode == 2 and "which a tmux window does not see" in done.stderr and runs() == []
    done = launch("toy.yaml", "--backend", "local", AWS_ENDPOINT_URL="http://key:secret@host/")
    assert done.returncode == 2 and "AWS_ENDPOINT_URL holds credentials" in done.stderr and runs() == []


def test_ambiguous_runs_are_named() -> None:
    for number in ("0001", "0002"):
        folder = Path(os.environ["LAUNCH_RUNS"]) / f"toy-20260101-000000-{number}"
        folder.mkdir(parents=True)
        write_json(folder / "run.json", {})
    done = launch("status", "toy")
    assert done.returncode == 2 and "toy-20260101-000000-0001" in done.stderr


def test_watching_ends_with_the_run_or_with_ctrl_c() -> None:
    folder = RunDir(Path(os.environ["LAUNCH_RUNS"]) / "toy-20260101-000000-0001")
    folder.path.mkdir(parents=True)
    write_json(folder.run, {"id": folder.id, "name": "toy", "created": time.time()})
    argv = {name: [*LAUNCH, "status", *name, "--watch"] for name in [("toy",), ()]}
    one, all_ = (subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for words in argv.values())
    time.sleep(2.5)
    assert one.poll() is None and all_.poll() is None
    write_json(folder.final, {"schema": 1, "id": folder.id, "state": "finished", "step": 7, "of": 7})
    assert one.wait(30) == 0 and "finished" in one.communicate()[0]
    assert all_.poll() is None, "others may start"
    all_.send_signal(signal.SIGINT)
    assert "finished" in all_.communicate(timeout=30)[0] and all_.returncode == 0


def test_a_log_that_is_not_there() -> None:
    folder = RunDir(Path(os.environ["LAUNCH_RUNS"]) / "toy-20260101-000000-0001")
    folder.path.mkdir(parents=True)
    write_json(folder.run, {"id": folder.id})
    write_json(folder.final, {"state": "failed"})
    for argv in (["logs", "toy"], ["logs", "toy", "--rank", "7"], ["logs", "toy", "--rank", "7", "-f"]):
        done = launch(*argv)
        assert done.returncode == 2 and f"run {folder.id} has no log logs/" in done.stderr, done


def test_the_schema_is_what_is_shipped_and_knows_every_section() -> None:
    told = launch("schema")
    shipped = Path(launcher.recipe.__file__).with_name("recipe.schema.json").read_text()
    assert json.loads(told.stdout) == json.loads(shipped)
    assert set(json.loads(shipped)["properties"]) == {*launcher.recipe.Recipe.model_fields, "extends"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    assert "_LAUNCH_COMPLETE" in launch("completion", shell).stdout


def test_completion_offers_verbs_files_and_runs() -> None:
    folder = Path(os.environ["LAUNCH_RUNS"]) / "toy-20260101-000000-0001"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {})

    def complete(*words: str) -> str:
        env = {"_LAUNCH_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["launch", *words])}
        return launch(COMP_CWORD=str(len(words)), **env).stdout

    assert "plain,status" in complete("sta") and "file," in complete("sta")
    assert "toy-20260101-000000-0001" in complete("logs", "to")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_verbs_options_runs_and_files() -> None:
    folder = Path(os.environ["LAUNCH_RUNS"]) / "toy-20260101-000000-0001"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {})
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def complete(*words: str) -> str:
        typed = " ".join(["launch", *words])
        script = 'eval "$(launch completion bash)"; compopt() { echo "files"; }; '
        script += f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _launch_completion launch; "
        done = subprocess.run(
            ["bash", "-c", script + 'echo "${COMPREPLY[*]}"'],
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stderr == "", done.stderr
        return " ".join(done.stdout.split())

    assert complete("sta") == "files status", "a file may be called so, too"
    assert complete("recipes/yolof") == "files"
    assert complete("logs", "to") == "toy-20260101-000000-0001"
    assert complete("logs", "la") == "last"
    assert "--follow" in complete("logs", "--f") and "--backend" in complete("toy.yaml", "--b")
    assert complete("resume", "x", "--backend", "t") == "tmux"


def test_help_names_every_verb() -> None:
    told = launch("--help").stdout
    assert launch().stdout == told
    for verb in (
        "status",
        "logs",
        "attach",
        "stop",
        "preempt",
        "resume",
        "rm",
        "validate",
        "store",
        "tensorboard",
    ):
        assert verb in told
        assert launch(verb, "--help").returncode == 0
    assert "--dry-run" in launch("run", "--help").stdout
