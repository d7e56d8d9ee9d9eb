"""Settings: who wins, where a value came from, and what a mistake reads like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.errors import SettingError
from shoal.settings import FLAGS, OPTIONS, Settings, resolve

SOURCES = ("code", "shoal.toml", "environment SHOAL_SEED", "flag --seed")


def test_flags_over_environment_over_file_over_code(tmp_path: Path) -> None:
    """For every subset of sources the last one in the list decides, and says that it did."""
    for chosen in range(2 ** len(SOURCES)):
        has = [bool(chosen >> n & 1) for n in range(len(SOURCES))]
        (tmp_path / "shoal.toml").write_text("version = 1\n[job]\n" + ("seed = 2\n" if has[1] else ""))
        environ = ({"SHOAL_SEED": "3"} if has[2] else {}) | ({FLAGS: json.dumps({"seed": 4})} if has[3] else {})
        resolved = resolve({"seed": 1} if has[0] else {}, environ=environ, cwd=tmp_path)
        winner = max((n for n in range(4) if has[n]), default=None)
        expected = (0, "default") if winner is None else (winner + 1, SOURCES[winner])
        assert (resolved.settings.seed, resolved.origins["seed"]) == expected
        assert resolved.explicit("seed") == (winner is not None)
        assert resolved.origins["threads"] == "default"


TEXTS = {
    "strategy": ("zero3", "zero3"),
    "leaves": ("4", 4),
    "ranks_per_copy": ("host", "host"),
    "twig": ("2", 2),
    "precision": ("bfloat16", "bfloat16"),
    "reduce": ("bfloat16", "bfloat16"),
    "masters": ("false", False),
    "cut": ("parameter", "parameter"),
    "numerics": ("fast", "fast"),
    "seed": ("-7", -7),
    "threads": ("2", 2),
    "timeout": ("3", 3.0),
    "overlap": ("false", False),
    "pending": ("true", True),
    "memory": ("1000", 1000),
    "layerwise": ("true", True),
    "carrier": ("mpi", "mpi"),
    "one_round": ("0", 0),
    "interface": ("eth0,eth1", "eth0,eth1"),
    "device": ("cpu", "cpu"),
    "run_dir": ("none", "none"),
}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_means_the_same_in_every_source(name: str, tmp_path: Path) -> None:
    text, value = TEXTS[name]
    shown = json.dumps(value)
    (tmp_path / "shoal.toml").write_text(f"version = 1\n[job]\n{name} = {shown}\n")
    flag = f"flag --{name.replace('_', '-')}" if name in OPTIONS else f"flag --set {name}"
    resolved = {
        "code": resolve({name: value}, environ={}, cwd="/"),
        "shoal.toml": resolve({}, environ={}, cwd=tmp_path),
        f"environment SHOAL_{name.upper()}": resolve({}, environ={f"SHOAL_{name.upper()}": text}, cwd="/"),
        flag: resolve({}, environ={FLAGS: json.dumps({name: text})}, cwd="/"),
    }
    for origin, found in resolved.items():
        assert getattr(found.settings, name) == value
        assert type(getattr(found.settings, name)) is type(value)
        assert found.origins[name] == origin


@pytest.mark.parametrize("name", ["leaves", "ranks_per_copy", "memory", "device"])
def test_none_in_text_is_nothing_but_was_asked_for(name: str) -> None:
    resolved = resolve({name: "host" if name == "device" else 3}, environ={f"SHOAL_{name.upper()}": "none"}, cwd="/")
    assert getattr(resolved.settings, name) is None
    assert resolved.explicit(name)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4096", 4096), ("512MiB", 2**29), ("2GB", 2 * 10**9), ("1.5 KiB", 1536), ("3kb", 3000), ("1TiB", 2**40)],
)
def test_memory_in_words(text: str, nbytes: int) -> None:
    assert resolve({"memory": text}, environ={}, cwd="/").settings.memory == nbytes
    assert resolve({}, environ={"SHOAL_MEMORY": text}, cwd="/").settings.memory == nbytes


@pytest.mark.parametrize("value", ["lots", "3 apples", "-1", 0, 1.5])
def test_memory_that_is_no_number_of_bytes(value: object) -> None:
    with pytest.raises(SettingError, match="such as 512MiB or 2GB") as error:
        resolve({"memory": value}, environ={}, cwd="/")
    assert str(error.value).startswith(f"shoal[E02] memory={value!r} (code) does not fit")


def test_none_in_code_says_nothing(tmp_path: Path) -> None:
    assert not resolve({"leaves": None, "timeout": None}, environ={}, cwd=tmp_path).explicit("leaves")


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "shoal.toml").write_text("version = 1\n[job]\nseed = 1\n")
    (tmp_path / "big.toml").write_text("version = 1\n[job]\nseed = 2\n")
    resolved = resolve({}, environ={"SHOAL_CONFIG": "big.toml"}, cwd=tmp_path)
    assert (resolved.settings.seed, resolved.origins["seed"]) == (2, "big.toml")


def test_table_shows_every_value_with_its_origin(tmp_path: Path) -> None:
    resolved = resolve({"strategy": "zero3"}, environ={"SHOAL_OVERLAP": "no"}, cwd=tmp_path)
    assert resolved.table().splitlines() == [
        "strategy        zero3    code",
        "leaves          -        default",
        "ranks_per_copy  -        default",
        "twig            1        default",
        "precision       float32  default",
        "reduce          float32  default",
        "masters         true     default",
        "cut             even     default",
        "numerics        exact    default",
        "seed            0        default",
        "threads         1        default",
        "timeout         60.0     default",
        "overlap         false    environment SHOAL_OVERLAP",
        "pending         false    default",
        "memory          -        default",
        "layerwise       false    default",
        "carrier         auto     default",
        "one_round       -        default",
        "interface       -        default",
        "device          -        default",
        "run_dir         -        default",
    ]


def test_shoals_own_variables_are_no_settings() -> None:
    own = {"SHOAL_RUN_DIR_ACTIVE": "x", "SHOAL_FAILURE_FILE": "x", "SHOAL_LAUNCHER_PID": "1", FLAGS: "{}"}
    assert resolve({}, environ=own, cwd="/").settings == Settings()


MISTAKES = {
    "unknown in code": (
        {"leafs": 2}, {}, None,
        "shoal[E02] unknown setting 'leafs' (code)\n  try:   did you mean 'leaves'? known: strategy, leaves, ",
    ),
    "unknown flag": (
        {}, {FLAGS: '{"tread": "2"}'}, None,
        "shoal[E02] unknown setting 'tread' (flag --set tread)\n  try:   did you mean 'threads'? ",
    ),
    "unknown variable": (
        {}, {"SHOAL_LEAFS": "2"}, None,
        "shoal[E02] unknown environment variable SHOAL_LEAFS\n  try:   did you mean 'SHOAL_LEAVES'? known: ",
    ),
    "unknown in the file": (
        {}, {}, "version = 1\n[job]\nstrateg = 'ddp'\n",
        "shoal[E02] unknown setting 'strateg' (shoal.toml)\n  try:   did you mean 'strategy'? ",
    ),
    "unknown table": (
        {}, {}, "version = 1\n[jobs]\nseed = 1\n",
        "shoal[E02] unknown 'jobs' in shoal.toml\n  try:   did you mean 'job'? known: version, job",
    ),
    "no version": (
        {}, {}, "[job]\nseed = 1\n",
        "shoal[E02] shoal.toml has no version\n  try:   version = 1 as its first line",
    ),
    "another version": (
        {}, {}, "version = 2\n",
        "shoal[E02] shoal.toml has version = 2\n  try:   version = 1 as its first line",
    ),
    "job is no table": (
        {}, {}, "version = 1\njob = 3\n",
        "shoal[E02] job in shoal.toml is 3, not a table\n  try:   [job], then a line for each setting",
    ),
    "no TOML": (
        {}, {}, "version = \n",
        "shoal[E02] shoal.toml is not TOML: Invalid value (at line 1, column 11)\n  try:   version = 1, then [job]",
    ),
    "no such file": (
        {}, {"SHOAL_CONFIG": "gone.toml"}, None,
        "shoal[E02] gone.toml cannot be read: No such file or directory\n  try:   set or unset SHOAL_CONFIG",
    ),
    "flags that are no JSON": (
        {}, {FLAGS: "seed=1"}, None,
        "shoal[E02] SHOAL_FLAGS='seed=1' is no JSON object\n  try:   unset SHOAL_FLAGS, shoal run sets it",
    ),
    "a choice": (
        {}, {"SHOAL_PRECISION": "half16"}, None,
        "shoal[E02] precision='half16' (environment SHOAL_PRECISION) does not fit\n"
        "  cause: Input should be 'float32', 'bfloat16' or 'float16'\n"
        "  try:   known: float32, bfloat16, float16",
    ),
    "too small": (
        {"threads": 0}, {}, None,
        "shoal[E02] threads=0 (code) does not fit\n  cause: Input should be greater than or equal to 1\n"
        "  try:   threads: threads of each rank, at least 1",
    ),
    "no number": (
        {}, {"SHOAL_TIMEOUT": "soon"}, None,
        "shoal[E02] timeout='soon' (environment SHOAL_TIMEOUT) does not fit\n  cause: Input should be a valid number, "
        "unable to parse string as a number\n  try:   timeout: seconds without progress, more than 0",
    ),
    "text in the file": (
        {}, {}, "version = 1\n[job]\nseed = '3'\n",
        "shoal[E02] seed='3' (shoal.toml) does not fit\n  cause: Input should be a valid integer\n",
    ),
    "true is no number": ({"seed": True}, {}, None, "shoal[E02] seed=True (code) does not fit\n"),
    "endless": ({"timeout": float("inf")}, {}, None, "shoal[E02] timeout=inf (code) does not fit\n"),
    "no ranks": ({"ranks_per_copy": 0}, {}, None, "shoal[E02] ranks_per_copy=0 (code) does not fit\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_mistake_reads_like(name: str, tmp_path: Path) -> None:
    code, environ, file, text = MISTAKES[name]
    if file is not None:
        (tmp_path / "shoal.toml").write_text(file)
    with pytest.raises(SettingError) as caught:
        resolve(code, environ=environ, cwd=tmp_path)
    assert str(caught.value).startswith(text)
    assert caught.value.exit_code == 2


# -------------------------------------------------------------------- mixed_precision.*, another spelling


@pytest.mark.parametrize(
    ("text", "precision", "reduce"),
    [
        ("mixed_precision.enabled = true", "bfloat16", "float32"),
        ("mixed_precision.enabled = true\nmixed_precision.allreduce_friendly = true", "bfloat16", "bfloat16"),
        ("[job.mixed_precision]\nenabled = true\nallreduce_friendly = false", "bfloat16", "float32"),
        ("mixed_precision.enabled = false", "float32", "float32"),
        ("precision = 'bfloat16'\nmixed_precision.enabled = true", "bfloat16", "float32"),
    ],
)
def test_mixed_precision(text: str, precision: str, reduce: str, tmp_path: Path) -> None:
    (tmp_path / "shoal.toml").write_text(f"version = 1\n[job]\n{text}\n")
    resolved = resolve({}, environ={}, cwd=tmp_path)
    assert (resolved.settings.precision, resolved.settings.reduce) == (precision, reduce)
    assert resolved.origins["precision"] == ("shoal.toml" if precision != "float32" else "default")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mixed_precision = true", r"is True, not a table[\s\S]*mixed_precision.enabled = true under \[job\]"),
        ("mixed_precision.enable = true", r"unknown 'mixed_precision.enable'[\s\S]*did you mean 'enabled'"),
        ("mixed_precision.enabled = 1", r"mixed_precision.enabled=1 \(shoal.toml\) does not fit[\s\S]*true or false"),
        ("mixed_precision.allreduce_friendly = true", r"without mixed_precision.enabled[\s\S]*enabled = true"),
        (
            "precision = 'float16'\nmixed_precision.enabled = true",
            r"precision='float16' contradicts mixed_precision.enabled in shoal.toml[\s\S]*one of the two",
        ),
    ],
)
def test_mixed_precision_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "shoal.toml").write_text(f"version = 1\n[job]\n{text}\n")
    with pytest.raises(SettingError, match=said):
        resolve({}, environ={}, cwd=tmp_path)
