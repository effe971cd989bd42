"""Configs: every mistake is reported at once and located; YAML reads as a person expects."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from utils.config import (
    Config,
    ConfigError,
    Problem,
    check_resume,
    load_config,
    load_yaml,
    plain,
    save_yaml,
    validate,
)


class Model(Config):
    d_model: int
    n_heads: int
    n_layers: int = 2

    def problems(self) -> Iterator[Problem]:
        if self.d_model % self.n_heads:
            text = f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads})"
            yield Problem(("d_model", "n_heads"), text)


class Optim(Config):
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "muon"] = "adamw"

    def problems(self) -> Iterator[Problem]:
        if self.betas[0] > self.betas[1]:
            yield Problem(("betas",), f"betas ({self.betas}) must not fall")


class Source(Config):
    name: str
    weight: float = 1.0
    cap: int | None = 5

    def problems(self) -> Iterator[Problem]:
        if self.name == "empty":
            yield Problem(("name",), "name (empty) is reserved")


class Run(Config):
    model: Model
    optim: Optim = Optim()
    sources: list[Source] = Field([])
    batch: int = 8
    micro_batch: int | Literal["auto"] = 2
    deterministic: bool = False
    note: str | None = None

    def problems(self) -> Iterator[Problem]:
        if self.model.n_layers > 90:
            yield Problem(("model.n_layers",), f"model.n_layers ({self.model.n_layers}) is absurd")
        if self.batch % 4:
            yield Problem(("batch",), f"batch ({self.batch}) must be a multiple of 4")


GOOD = {"model": {"d_model": 8, "n_heads": 2}}


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(raw: dict) -> list[str]:
    """The problems in a `Run`, without the line above them."""
    with pytest.raises(ConfigError) as caught:
        validate(Run, raw, "run.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == f"{len(lines)} problem(s) in run.yaml:"
    return [line.strip() for line in lines]


# ---- validation ----


def test_defaults_then_yaml_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {d_model: 8, n_heads: 2}\noptim: {lr: 3e-4}\nbatch: 16\n")
    config = load_config(Run, path, ["optim.lr=1e-5", "optim.betas=[0.8, 1]"])
    assert (config.batch, config.micro_batch) == (16, 2)
    assert config.optim == Optim(lr=1e-5, betas=(0.8, 1.0))


def test_all_problems_are_reported_at_once() -> None:
    raw = {
        "model": {"d_model": 10, "n_heads": 4, "n_layers": 99},
        "optim": {"lr": -1, "wieght_decay": 0.1, "kind": "moun", "betas": [0.99, 0.9]},
        "sources": [{"name": "a"}, {"name": 7, "weight": "much"}, {"weight": 2}, {"name": "empty"}],
        "batch": 10,
        "micro_batch": "full",
        "deterministic": "yes",
    }
    assert sorted(problems_of(raw)) == sorted(
        [
            "optim.wieght_decay: unknown key, did you mean 'weight_decay'?",
            "optim.lr: should be greater than 0, but is -1",
            "optim.kind: should be 'adamw' or 'muon', but is \"moun\"; did you mean 'muon'?",
            "sources.1.name: should be a valid string, but is 7; put it in quotes",
            'sources.1.weight: should be a valid number, but is "much"',
            "sources.2.name: required, but missing",
            "micro_batch: should be a valid integer or should be 'auto', but is \"full\"",
            'deterministic: should be a valid boolean, but is "yes"; write true or false',
            "model.d_model (10) must be a multiple of n_heads (4)",
            "model.n_layers (99) is absurd",
            "optim.betas ([0.99, 0.9]) must not fall",
            "sources.3.name (empty) is reserved",
            "batch (10) must be a multiple of 4",
        ]
    )


def test_a_rule_that_reads_a_failed_field_is_not_judged_by_its_default() -> None:
    class Pair(Config):
        low: int = 0
        high: int = 1

        def problems(self) -> Iterator[Problem]:
            if self.low >= self.high:
                yield Problem(("low", "high"), f"low ({self.low}) must be below {self.high}")

    for broken in ({"low": 5, "high": "9"}, {"low": 5, "hihg": 9}):
        with pytest.raises(ConfigError) as caught:
            validate(Pair, broken, "pair")
        assert "must be below" not in str(caught.value)


def test_a_missing_required_field_silences_only_the_rules_of_its_config() -> None:
    raw = {"model": {"n_heads": 2, "n_layers": 99}, "optim": {"betas": [1, 0.5]}, "batch": 3}
    assert problems_of(raw) == [
        "model.d_model: required, but missing",
        "model.n_layers (99) is absurd",
        "batch (3) must be a multiple of 4",
        "optim.betas ([1, 0.5]) must not fall",
    ]


def test_a_missing_block_keeps_the_rules_of_the_others() -> None:
    lines = problems_of({"optim": {"betas": [1, 0.5]}})
    assert lines == ["model: required, but missing", "optim.betas ([1, 0.5]) must not fall"]


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"lr": 1}, "lr: unknown key, did you mean 'optim.lr'?"),
        ({"modle": 1}, "modle: unknown key, did you mean 'model'?"),
        ({"sources": [{"name": "a", "wait": 1}]}, "sources.0.wait: unknown key, did you mean"),
        ({"optim": {"z": 1}}, "optim.z: unknown key; known here: lr, weight_decay, betas, kind"),
        ({"optim": 5}, "optim: should be a mapping, but is 5"),
        ({"sources": {"name": "a"}}, 'sources: should be a list, but is {"name": "a"}'),
        ({"sources": ["a"]}, 'sources.0: should be a mapping, but is "a"'),
        ({"optim": {"betas": [0.9, "x"]}}, 'optim.betas.1: should be a valid number, but is "x"'),
        ({"optim": {"lr": float("nan")}}, "optim.lr: should be a finite number, but is NaN"),
        ({"batch": 1e3}, "batch: should be a valid integer, but is 1000.0; write 1_000"),
        ({"batch": True}, "batch: should be a valid integer, but is true"),
        ({"batch": None}, "batch: should be a valid integer, but is null"),
        ({"deterministic": 1}, "deterministic: should be a valid boolean, but is 1; write true"),
        ({"batch": "x" * 99}, 'batch: should be a valid integer, but is "' + 56 * "x" + "..."),
    ],
)  # fmt: skip
def test_message(raw: dict, line: str) -> None:
    (found,) = problems_of(GOOD | raw)
    assert found.startswith(line)


def test_a_mistake_in_a_rule_itself_is_not_hidden() -> None:
    class Wrong(Config):
        def problems(self) -> Iterator[Problem]:
            yield Problem((), self.nonexistent)

    with pytest.raises(AttributeError):
        validate(Wrong, {}, "wrong")


def test_not_a_mapping() -> None:
    with pytest.raises(ConfigError, match="should be a mapping, but is null"):
        validate(Run, None, "base.pt")


# ---- overrides ----


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("sources.1.weight=0.5", lambda run: run.sources[1].weight == 0.5),
        ("sources.0.cap=null", lambda run: run.sources[0].cap is None),
        ("note=", lambda run: run.note is None),
        ("note='3'", lambda run: run.note == "3"),
        ("note=a=b", lambda run: run.note == "a=b"),
        ("note=no", lambda run: run.note == "no"),
        ("optim.weight_decay=0", lambda run: run.optim.weight_decay == 0.0),
        ("optim={lr: 0.5}", lambda run: run.optim == Optim(lr=0.5)),
        ("batch=1_000", lambda run: run.batch == 1000),
    ],
)
def test_override(tmp_path: Path, override: str, read: Callable[[Run], bool]) -> None:
    text = "model: {d_model: 8, n_heads: 2}\nnote: hello\nsources: [{name: a}, {name: b}]"
    assert read(load_config(Run, write(tmp_path, text), [override]))


def test_an_override_fills_an_empty_block(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\noptim:\n")
    config = load_config(Run, path, ["model.d_model=4", "model.n_heads=2", "optim.lr=0.5"])
    assert (config.model.d_model, config.optim.lr) == (4, 0.5)


def test_bad_overrides_are_reported_with_everything_else(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {d_model: 9, n_heads: 2}\nsources: [{name: a}]\nbatch: 5\n")
    overrides = ["optim.lrr=1", "sources.7.weight=1", "batch.x=1", "note=[", "=3", "model"]
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, overrides)
    for part in (
        "optim.lrr: unknown key, did you mean 'lr'?",
        'sources.7.weight: there is no \'7\' in [{"name": "a"}]',
        "batch.x: there is no 'x' in 5",
        "note: its value '[', line 1: ",
        "an override has the form key.sub=value",
        "model: an override has the form key.sub=value",
    ):
        assert part in str(caught.value)


def test_an_override_of_one_alias_leaves_the_other(tmp_path: Path) -> None:
    text = "model: {d_model: 8, n_heads: 2}\nsources: [&a {name: a}, *a]\n"
    config = load_config(Run, write(tmp_path, text), ["sources.0.weight=3"])
    assert [source.weight for source in config.sources] == [3, 1]


def test_a_model_file_is_read_before_overrides_of_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "{d_model: 8, n_heads: 2}", "small.yaml")
    write(tmp_path, "{d_model: 16, n_heads: 2}", "large.yaml")
    path = write(tmp_path, "model: small.yaml")
    assert load_config(Run, path, ["model.n_layers=3"]).model == Model(
        d_model=8, n_heads=2, n_layers=3
    )
    both = ["model.n_layers=3", "model=large.yaml"]
    assert load_config(Run, path, both).model == Model(d_model=16, n_heads=2, n_layers=3)
    (tmp_path / "here").mkdir()
    write(tmp_path / "here", "{d_model: 4, n_heads: 2}", "small.yaml")
    monkeypatch.chdir(tmp_path / "here")
    assert load_config(Run, path).model.d_model == 4, "the current directory comes first"


def test_a_missing_model_file_is_one_problem_among_the_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, write(tmp_path, "model: gone.yaml\nbatch: 3"))
    assert str(caught.value).splitlines()[1:] == [
        "  model: gone.yaml: No such file or directory",
        "  batch (3) must be a multiple of 4",
    ]


# ---- YAML ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e6", 1e6), ("-.5", -0.5), ("1.", 1.0), ("1_000.5", 1000.5),
        ("010", 10), ("1_000_000", 1_000_000), ("+7", 7), ("-3", -3),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("12:30", "12:30"), ("2024-01-01",) * 2,
        ("0x10", "0x10"), ("1__0", "1__0"), ("_1", "_1"), (".", "."), ("e5", "e5"), ("1.2.3",) * 2,
        ('"3e-4"', "3e-4"), ("'true'", "true"), ("=", "="), ("!!python/name:os.system x", "x"),
    ],
)  # fmt: skip
def test_scalars_read_as_a_person_expects(tmp_path: Path, text: str, value: object) -> None:
    read = load_yaml(write(tmp_path, f"key: {text}\n"))["key"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: duplicate key 'a'"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: duplicate key 'b'"),
        ("a: 1\nb:\n\tc: 1\n", "line 3: .*indent with spaces"),
        ("a: [1, 2\nb: 3\n", "line 2: "),
        ("a: 1\n  b: 2\n", "line 2: "),
        ("? [x]\n: 1\n", "line 1: a key must be text"),
        ("a: &x [*x]\n", "line 1: .*recursive"),
        ("a: *nowhere\n", "line 1: .*undefined alias"),
        ("a: 1\n---\nb: 2\n", "line 2: "),
        ("a: \x00\n", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- 1\n", "is a list"),
        ("words", "is a str"),
    ],
)
def test_odd_yaml_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml.*{message}"):
        load_yaml(write(tmp_path, text))


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone: No such file"):
        load_yaml(tmp_path / "gone")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_yaml(tmp_path)
    (tmp_path / "latin").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="latin: not UTF-8 text"):
        load_yaml(tmp_path / "latin")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_yaml(tmp_path / "bom") == {"a": 1}


leaves = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
trees = st.recursive(
    leaves.filter(lambda x: x not in (float("inf"), -float("inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(), trees | st.sampled_from(["3e-4", "1_0", "no", "~", "-.5", "010"]))
)
def test_what_is_saved_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: dict
) -> None:
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    save_yaml(path, values)
    assert repr(load_yaml(path)) == repr(values)


def test_plain_values_rebuild_the_config() -> None:
    config = Run(model=Model(d_model=8, n_heads=2), sources=[Source(name="a", cap=None)])
    assert validate(Run, plain(config), "checkpoint") == config


# ---- resume ----


def run(**values) -> Run:
    return validate(Run, GOOD | values, "test")


def refusals(old: dict, new: Run, may_change: list[str]) -> list[str]:
    """The lines that name a setting."""
    with pytest.raises(ConfigError) as caught:
        check_resume(old, new, may_change)
    head, *lines, free = str(caught.value).splitlines()
    assert "restore them or start another run" in head
    assert free == f"  free to change: {', '.join(may_change)}"
    return [line.strip() for line in lines]


def test_resume_refuses_what_changes_the_run_and_lists_it() -> None:
    old = plain(run(optim={"lr": 1.0}, micro_batch=4))
    new = run(optim={"lr": 2.0, "betas": [0.9, 0.99]}, micro_batch="auto")
    check_resume(old, run(optim={"lr": 1.0}, micro_batch=4), [])
    check_resume(old, new, ["optim", "micro_batch"])
    assert refusals(old, new, ["micro_batch", "opt"]) == [
        "optim.lr: 1.0 -> 2.0",
        "optim.betas: [0.9, 0.95] -> [0.9, 0.99]",
    ]


def test_resume_locates_list_items() -> None:
    old = plain(run(sources=[{"name": "a", "weight": 1}, {"name": "b", "weight": 2}]))
    new = run(sources=[{"name": "a", "weight": 1}, {"name": "b", "weight": 4}])
    assert refusals(old, new, []) == ["sources.1.weight: 2.0 -> 4.0"]
    shorter = run(sources=[{"name": "a", "weight": 1}])
    assert refusals(old, shorter, ["note"]) == [
        'sources.1.name: "b" -> null', "sources.1.weight: 2.0 -> null", "sources.1.cap: 5 -> null",
    ]  # fmt: skip


def test_a_checkpoint_older_than_a_key_has_its_default() -> None:
    old = plain(run(sources=[{"name": "a"}]))
    del old["optim"]["betas"], old["sources"][0]["cap"], old["model"]["n_layers"], old["batch"]
    check_resume(old, run(sources=[{"name": "a"}]), [])
    new = run(
        model={"d_model": 8, "n_heads": 2, "n_layers": 3}, optim={"betas": [0.5, 0.6]},
        sources=[{"name": "a", "cap": None}], batch=16,
    )  # fmt: skip
    assert set(refusals(old, new, [])) == {
        "sources.0.cap: 5 -> null", "model.n_layers: 2 -> 3",
        "optim.betas: [0.9, 0.95] -> [0.5, 0.6]", "batch: 8 -> 16",
    }  # fmt: skip
    del old["optim"]
    check_resume(old, run(sources=[{"name": "a"}]), [])
    assert refusals(old, run(optim={"lr": 0.5}, sources=[{"name": "a"}]), []) == [
        "optim.lr: 0.001 -> 0.5"
    ]


def test_a_checkpoint_older_than_a_required_key_is_refused() -> None:
    old = plain(run())
    del old["model"]["d_model"]
    assert refusals(old, run(), []) == ["model.d_model: null -> 8"]


def test_a_setting_that_is_gone_is_named_unless_it_was_null() -> None:
    old = plain(run()) | {"gone": 3, "unset": None}
    old["optim"]["clip"] = {"norm": 0.5, "value": None}
    says = "-> no setting here; resume with the code that wrote it"
    assert set(refusals(old, run(), [])) == {f"gone: 3 {says}", f"optim.clip.norm: 0.5 {says}"}
    check_resume(old, run(), ["gone", "optim"])
