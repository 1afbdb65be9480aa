"""Recipes: what they mean, and how every mistake is told."""

import json
from pathlib import Path

import pytest
import yaml

from launcher.errors import RecipeError
from launcher.recipe import load, load_frozen, schema

ROOT = Path(__file__).parents[2]
MINIMAL = "program: {script: train.py}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(write("r.yaml", text), overrides)
    assert caught.value.exit_status == 2
    return caught.value.message


def test_scalars_are_read_as_yaml_1_2_reads_them() -> None:
    text = (
        "train: {a: 1e-3, b: 24:00:00, c: yes, d: 010, e: 0x1F, f: 0o17, g: ~, h: 2024-01-01, i: '1', j: -.5}"
    )
    train = load(write("r.yaml", MINIMAL + text)).train
    assert train == {
        "a": 0.001, "b": "24:00:00", "c": "yes", "d": 10, "e": 31, "f": 15, "g": None, "h": "2024-01-01",
        "i": "1", "j": -0.5,
    }  # fmt: skip


@pytest.mark.parametrize("read", [load_frozen, lambda path: yaml.safe_load(path.read_text())])
def test_what_is_frozen_reads_the_same_by_yaml_1_1_and_1_2(read: object) -> None:
    odd = [
        "1e-3",
        "yes",
        "24:00:00",
        "010",
        "0o17",
        "2024-01-01",
        "null",
        "",
        " x ",
        "a: b",
        "#",
        "é",
        "1_0",
        "<<",
    ]
    numbers = [1e-3, 1e-10, 1.5e300, 3, -2, True, None]
    train = {"odd": odd, "numbers": numbers, "1": {"2": []}}
    recipe = load(write("r.yaml", MINIMAL + "train: " + json.dumps(train)))
    assert recipe.train == train
    again = read(write("frozen.yaml", recipe.dump()))  # type: ignore[operator]
    assert (again["train"] if isinstance(again, dict) else again.train) == train


def test_extends_merges_mappings_replaces_lists_and_goes_through_folders() -> None:
    write(
        "base/one.yaml",
        "resources: {gpus: 8, device: cpu}\ntrain: {steps: [1, 2], model: {name: a, width: 1}}\n",
    )
    write("base/two.yaml", MINIMAL + "extends: one.yaml\ntrain: {model: {width: 2}}\n")
    recipe = load(
        write("r.yaml", "extends: [base/two.yaml]\ntrain: {steps: [3], extra: 1}\n"), ["resources.gpus=2"]
    )
    assert recipe.train == {"steps": [3], "model": {"name": "a", "width": 2}, "extra": 1}
    assert (recipe.resources.gpus, recipe.resources.device) == (2, "cpu")


def test_a_mistake_in_a_base_is_told_where_it_stands() -> None:
    write("base.yaml", MINIMAL + "# a comment\nresources:\n    gpu: 8\n")
    assert refusal("extends: base.yaml\n") == (
        "base.yaml:4:5: `resources.gpu` is unknown; did you mean `gpus`?\n        gpu: 8\n        ^"
    )


def test_the_file_that_had_the_last_word_is_named() -> None:
    write("base.yaml", MINIMAL + "resources: {gpus: 8}\n")
    assert refusal("extends: base.yaml\nresources: {gpus: eight}\n").startswith(
        "r.yaml:2:19: `resources.gpus` must be"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resorces: {}\n", "r.yaml:2:1: `resorces` is unknown; did you mean `resources`?"),
        ("resources: {gpus: '8'}\n", "r.yaml:2:19: `resources.gpus` must be a whole number"),
        ("resources: {gpus: true}\n", "must be a whole number"),
        ("resources: {gpus: 0}\n", "must be at least 1, not 0"),
        ("resources: 8\n", "r.yaml:2:12: `resources` must hold `key: value` lines"),
        ("resources: {device: tpu}\n", "must be `cuda` or `cpu`, not `tpu`"),
        ("restart: {grace: 24:00:00}\n", "must be a duration such as 90s, 10m or 2h, not '24:00:00'"),
        ("restart: {grace: 0s}\n", "must be more than 0"),
        (
            "checkpoint: {every: 0it}\n",
            "must be a time such as 10m or 90s, or a number of steps such as 500it",
        ),
        ("checkpoint: {keep_every: 10m}\n", "must be a number of steps such as 5000it, not '10m'"),
        ("env: {vars: {A-B: x}}\n", "`env.vars.A-B` has characters that are not allowed here"),
        ("env: {vars: {LAUNCH_RUN_ID: x}}\n", "belongs to the launcher"),
        ("env: {vars: {AWS_SECRET_ACCESS_KEY: hunter2}}\n", "looks like a secret"),
        ("env: {keep: [HF_TOKEN]}\n", "looks like a secret"),
        ("storage: {url: 's3://key:hunter2@bucket/x'}\n", "`storage.url` holds credentials"),
        (
            "fetch: [{from: 's3://a/b', to: x}, {from: 'file:///c', to: ./x/}]\n",
            "r.yaml:2:8: `fetch` must not bring two data sets to one folder, x\n",
        ),
        ("tmux: {session: 'a:b'}\n", "has characters that are not allowed here"),
        ("train: 3\n", "`train` must hold `key: value` lines"),
        ("train: {a: 1, a: 2}\n", "r.yaml:2:15: `a` is here twice (first: line 2)"),
        ("train: {a: .nan}\n", "r.yaml:2:12: numbers here must be finite"),
        ("train: {a: 1e999}\n", "numbers here must be finite"),
        ("train: {a: [1, 2}\n", "r.yaml:2:17: not YAML:"),
        ("train: {a: &x 1, b: *x}\n", "r.yaml:2:12: not YAML: anchors and aliases are not read"),
        ("train: !!python/object/apply:os.system ['true']\n", "r.yaml:2:8: not YAML: tags such as"),
        ("train: {[1]: 2}\n", "a key must be plain text"),
        ("train: " + "[" * 5000 + "\n", "nested too deeply"),
        ("\x00", "not YAML"),
        ("extends: nowhere.yaml\n", "r.yaml:2:10: there is no recipe nowhere.yaml to extend"),
        ("extends: [r.yaml]\n", "r.yaml:2:11: `extends` goes in a circle: r.yaml -> r.yaml"),
        ("extends: {a: b}\n", "`extends` takes a path or a list of paths"),
        ("program: {}\n", "r.yaml:2:1: `program` is here twice"),
    ],
)
def test_mistakes_in_a_file(text: str, said: str) -> None:
    told = refusal(MINIMAL + text)
    assert said in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "r.yaml:1:1: this recipe is empty"),
        ("- 1\n", "this recipe must hold `key: value` lines"),
        ("train: {}\n", "r.yaml:1:1: `program` is missing"),
        ("program: {module: a, script: b}\n", "r.yaml:1:10: `program` names either a `module` or a `script`"),
        ("program: {module: 'a; rm'}\n", "has characters that are not allowed here"),
    ],
)
def test_mistakes_in_a_whole_file(text: str, said: str) -> None:
    assert said in refusal(text)


def test_files_that_are_no_recipes() -> None:
    Path("latin.yaml").write_bytes(b"a: \xff")
    Path("folder.yaml").mkdir()
    for name, said in [
        ("none.yaml", "there is no such recipe"),
        ("latin.yaml", "not UTF-8"),
        ("folder.yaml", "a folder"),
    ]:
        with pytest.raises(RecipeError, match=said):
            load(Path(name))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "resources.gpu=2",
            "resources.gpu=2 on the command line: `resources.gpu` is unknown; did you mean `gpus`?",
        ),
        ("train.modle.width=2", "`train.modle.width` is not in the recipe"),
        ("train.model.widht=2", "`train.model.widht` is not in the recipe; did you mean `width`?"),
        ("train.model.width.x=2", "`train.model.width` holds no keys to override"),
        (
            "resources.gpus=two",
            "resources.gpus=two on the command line: `resources.gpus` must be a whole number",
        ),
        ("resources.gpus", "an override looks like section.key=value"),
        ("resources..gpus=2", "an override looks like section.key=value"),
        ("train.model.width=[1", "not YAML"),
        ("resources.min_gpus=3", "1 GPU is too few; this recipe needs 3"),
    ],
)
def test_mistakes_on_the_command_line(override: str, said: str) -> None:
    assert said in refusal(MINIMAL + "train: {model: {width: 1}, evaluation: null}\n", override)


def test_overrides_are_read_as_yaml_and_merge() -> None:
    path = write(
        "r.yaml", MINIMAL + "train: {model: {width: 1, name: a}, evaluation: {every: null}, short: [1, 2]}\n"
    )
    recipe = load(
        path, ["train.model={width: 2}", "train.short=[3]", "train.evaluation.every=5", "env.vars.X=7"]
    )
    assert recipe.train == {"model": {"width": 2, "name": "a"}, "evaluation": {"every": 5}, "short": [3]}
    assert recipe.env.vars == {"X": "7"}


def test_too_few_gpus_are_refused_with_the_reason_and_the_option_that_said_so() -> None:
    path = write("r.yaml", MINIMAL + "resources: {gpus: 8, min_gpus: 4, min_gpus_why: plain BN}\n")
    with pytest.raises(RecipeError, match=r"^--gpus: 2 GPUs are too few; this recipe needs 4: plain BN$"):
        load(path, (), {"resources.gpus": ("--gpus", 2)})
    assert load(path, (), {"resources.gpus": ("--gpus", 4)}).resources.gpus == 4


def test_durations_and_intervals() -> None:
    text = "restart: {grace: 2m, hang: 1h, backoff: 0.5s}\ncheckpoint: {every: 10m}\nmirror: {every: 3}\n"
    recipe = load(write("r.yaml", MINIMAL + text))
    assert (recipe.restart.grace, recipe.restart.hang, recipe.restart.backoff) == (120, 3600, 0.5)
    assert (recipe.checkpoint.every, recipe.mirror.every) == ("600s", 3)
    assert load(Path("r.yaml"), ["checkpoint.every=500it"]).checkpoint.every == "500it"
    spaced = load(Path("r.yaml"), ["checkpoint.keep_every=5000it"])
    assert spaced.checkpoint.keep_every == 5000
    assert load(write("frozen.yaml", spaced.dump())) == spaced


def test_the_hash_covers_the_training_and_nothing_else() -> None:
    path = write("r.yaml", MINIMAL + "train: {lr: 0.1}\n")
    same = [
        "resources.gpus=4",
        "restart.grace=9s",
        "storage.url=s3://a/b",
        "checkpoint.every=600s",
        "train.lr=1e-1",
    ]
    assert {load(path, [override]).hash() for override in same} == {load(path).hash()}
    for other in ("train.lr=0.2", "checkpoint.every=5m", "program.args=[a]"):
        assert load(path, [other]).hash() != load(path).hash()


def test_a_frozen_recipe_stands_alone() -> None:
    recipe = load(write("r.yaml", MINIMAL + "resources: {gpus: 3}\n"))
    assert load_frozen(write("frozen.yaml", recipe.dump())) == recipe
    with pytest.raises(RecipeError, match="a frozen recipe cannot extend"):
        load_frozen(write("frozen.yaml", "extends: r.yaml\n"))


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = json.loads((ROOT / "launcher" / "recipe" / "recipe.schema.json").read_text())
    assert shipped == schema(), "launch schema > launcher/recipe/recipe.schema.json"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert load(path).program.module == "detcore.train"
