"""Settings of a job, and where each value came from.

Flags win over the environment, the environment over one file, the file over code, code over defaults. A setting has the
same name everywhere: `leaves=4` in code, `leaves = 4` under `[job]` in `shoal.toml`, `SHOAL_LEAVES=4`, `--leaves 4`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shoal.errors import SettingError, nearest

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for kind, base in (("b", 1000), ("ib", 1024))
    for power, letter in enumerate("kmgt", start=1)
}


def nbytes(value: object) -> object:
    """`"512MiB"` as a number of bytes; anything else as it is."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
        if found and found[2] in _UNITS:
            return int(float(found[1]) * _UNITS[found[2]])
    return value


class Settings(BaseModel):
    """Every setting of a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: str = Field("ddp", description="the name of a strategy")
    leaves: int | None = Field(None, ge=1, description="micro-batches of a step, at least 1; none: the world")
    ranks_per_copy: Annotated[int, Field(ge=1)] | Literal["host"] | None = Field(
        None, description="ranks that hold one model together, at least 1, or host; none: what the strategy says"
    )
    twig: int = Field(1, ge=1, description="neighbouring leaves added in place before the tree, at least 1")
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what is computed in")
    reduce: Literal["float32", "bfloat16"] = Field("float32", description="what gradients travel and are summed in")
    masters: bool = Field(True, description="true or false: whether bfloat16 has float32 masters")
    cut: Literal["even", "parameter"] = Field("even", description="where shards may end")
    numerics: Literal["exact", "fast"] = Field("exact", description="whose sums: exact, or fast (the backend's)")
    seed: int = Field(0, description="a whole number")
    threads: int = Field(1, ge=1, description="threads of each rank, at least 1")
    timeout: float = Field(60.0, gt=0, allow_inf_nan=False, description="seconds without progress, more than 0")
    overlap: bool = Field(True, description="true or false: whether transfers run beside computation")
    pending: bool = Field(False, description="true or false: whether updates may be under way when a step returns")
    memory: Annotated[int, BeforeValidator(nbytes), Field(ge=1)] | None = Field(
        None, description="bytes of a rank, such as 512MiB or 2GB; none: units are freed after use"
    )
    layerwise: bool = Field(False, description="true or false: whether units are updated while backward runs")
    carrier: Literal["auto", "gloo", "shared", "nccl", "mpi"] = Field("auto", description="what moves the bytes")
    one_round: Annotated[int, BeforeValidator(nbytes), Field(ge=0)] | None = Field(
        None, description="bytes, such as 32KiB, or 0; none: as measured where it may pay"
    )
    interface: str | None = Field(None, description="network interfaces, as eth0 or eth0,eth1; none: by the way")
    device: str | None = Field(None, description="a device of torch; none: what the machine has")
    run_dir: str | None = Field(None, description="a directory, none to keep nothing")


CONFIG = "SHOAL_CONFIG"  # a path that takes the place of ./shoal.toml
FLAGS = "SHOAL_FLAGS"  # what `shoal run` was told, as JSON
ACTIVE_RUN_DIR = "SHOAL_RUN_DIR_ACTIVE"  # the directory that `shoal run` made for all ranks, or none
FAILURE_FILE = "SHOAL_FAILURE_FILE"  # where a worker says why it failed
LAUNCHER = "SHOAL_LAUNCHER_PID"  # the process that started this worker
TRACE = "SHOAL_TRACE"  # as JSON, where a job leaves the state of each of its first steps: `shoal verify`
BENCH = "SHOAL_BENCH"  # as JSON, where a job leaves what it has seen of itself: `shoal bench`
INTERNAL = frozenset({FLAGS, ACTIVE_RUN_DIR, FAILURE_FILE, LAUNCHER, TRACE, BENCH})

OPTIONS = ("strategy", "leaves", "seed", "threads", "precision", "timeout", "run_dir")  # those with a flag of their own
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Settings, and origins: "flag --seed", "environment SHOAL_SEED", "shoal.toml", "code" or "default"."""

    settings: Settings
    origins: dict[str, str]

    def explicit(self, name: str) -> bool:
        """Whether somebody asked for this value."""
        return self.origins[name] != "default"

    def table(self) -> str:
        """Every setting, its value and its origin, a line each."""
        values = {name: _shown(getattr(self.settings, name)) for name in self.origins}
        wide, long = max(map(len, values)), max(map(len, values.values()))
        return "\n".join(f"{name:{wide}}  {values[name]:{long}}  {origin}" for name, origin in self.origins.items())


def check_together(s: Settings) -> None:
    """Raises `SettingError` for settings that contradict each other."""
    needs = {"pending": "what is pending is overlapped with the next forward",
             "memory": "what stays in memory is decided from the order that transfers follow",
             "layerwise": "which gradient is a unit's last is known from the order that transfers follow"}  # fmt: skip
    for name, why in needs.items():
        if getattr(s, name) and not s.overlap:
            value = "True" if getattr(s, name) is True else getattr(s, name)
            away = "leave memory= out" if name == "memory" else f"{name}=False"
            raise SettingError(f"{name}={value} with overlap=False", cause=why, remedy=f"{away}, or overlap=True")
    if s.layerwise and s.pending:
        raise SettingError(
            "layerwise=True with pending=True",
            cause="units are updated while backward runs: nothing is left to be pending",
            remedy="pending=False, or layerwise=False",
        )


def resolve(code: Mapping[str, object], *, environ: Mapping[str, str], cwd: str | Path | None) -> Resolved:
    """Decide every setting.

    Args:
        code: what the program says; a value of None says nothing.
        environ: the process environment.
        cwd: where `shoal.toml` is looked for; None: nowhere.

    Raises:
        SettingError: an unknown name, a value that does not fit, or a file that cannot be read.
    """
    sources = [
        _Source({name: value for name, value in code.items() if value is not None}, lambda _name: "code"),
        _file(environ, Path(cwd)) if cwd is not None else _Source({}, str),
        _environment(environ),
        _flags(environ),
    ]
    values: dict[str, object] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")
    for source in sources:
        for name, value in source.values.items():
            origin = source.origin(name)
            _known(name, Settings.model_fields, f"setting {name!r} ({origin})")
            values[name] = _fitting(name, value, origin, text=source.text and isinstance(value, str))
            origins[name] = origin
    return Resolved(settings=Settings.model_validate(values), origins=origins)


@dataclass(frozen=True)
class _Source:
    """Values from one place. `text`: strings stand for values of any type; else types must be right."""

    values: Mapping[str, object]
    origin: Callable[[str], str]
    text: bool = False


def _file(environ: Mapping[str, str], cwd: Path) -> _Source:
    asked = environ.get(CONFIG)
    path, shown = (cwd / asked, asked) if asked else (cwd / "shoal.toml", "shoal.toml")
    if not asked and not path.exists():
        return _Source({}, str)
    try:
        document: dict[str, object] = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingError(f"{shown} cannot be read: {error.strerror}", remedy=f"set or unset {CONFIG}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{shown} is not TOML: {error}", remedy="version = 1, then [job], then seed = 0") from None
    for key in document:
        _known(key, ("version", "job"), f"{key!r} in {shown}")
    version, job = document.get("version"), document.get("job", {})
    if type(version) is not int or version != VERSION:
        said = "no version" if version is None else f"version = {version!r}"
        raise SettingError(f"{shown} has {said}", remedy=f"version = {VERSION} as its first line")
    if not isinstance(job, dict):
        raise SettingError(f"job in {shown} is {job!r}, not a table", remedy="[job], then a line for each setting")
    return _Source(_spelled_out(cast("dict[str, object]", job), shown), lambda _name: shown)


_MIXED = {"enabled": "precision", "allreduce_friendly": "reduce"}
"""`mixed_precision.enabled` computes in bfloat16; `.allreduce_friendly` reduces in the dtype that is computed in."""


def _spelled_out(job: dict[str, object], shown: str) -> dict[str, object]:
    """The same with `mixed_precision.*` as the settings that it stands for."""
    mixed = job.get("mixed_precision")
    if mixed is None:
        return job
    job = {name: value for name, value in job.items() if name != "mixed_precision"}
    if not isinstance(mixed, dict):
        raise SettingError(
            f"mixed_precision in {shown} is {mixed!r}, not a table", remedy="mixed_precision.enabled = true under [job]"
        )
    asked = cast("dict[str, object]", mixed)
    for name, value in asked.items():
        _known(name, _MIXED, f"'mixed_precision.{name}' in {shown}")
        if not isinstance(value, bool):
            raise SettingError(f"mixed_precision.{name}={value!r} ({shown}) does not fit", remedy="true or false")
    if not asked.get("enabled"):
        if asked.get("allreduce_friendly"):
            raise SettingError(
                f"mixed_precision.allreduce_friendly in {shown} without mixed_precision.enabled",
                cause="gradients travel in the dtype that is computed in, which is float32 then",
                remedy="mixed_precision.enabled = true",
            )
        return job
    for name, setting in _MIXED.items():
        if asked.get(name) and job.setdefault(setting, "bfloat16") != "bfloat16":
            raise SettingError(
                f"{setting}={job[setting]!r} contradicts mixed_precision.{name} in {shown}, which says bfloat16",
                remedy=f"one of the two: {setting} under [job], or mixed_precision.{name}",
            )
    return job


def _environment(environ: Mapping[str, str]) -> _Source:
    variables = {f"SHOAL_{name.upper()}": name for name in Settings.model_fields}
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if variable.startswith("SHOAL_") and variable not in INTERNAL and variable != CONFIG:
            _known(variable, (*variables, CONFIG), f"environment variable {variable}")
            values[variables[variable]] = text
    return _Source(values, lambda name: f"environment SHOAL_{name.upper()}", text=True)


def _flags(environ: Mapping[str, str]) -> _Source:
    try:
        flags: object = json.loads(environ.get(FLAGS, "{}"))
    except json.JSONDecodeError:
        flags = None
    if not isinstance(flags, dict):
        raise SettingError(f"{FLAGS}={environ[FLAGS]!r} is no JSON object", remedy=f"unset {FLAGS}, shoal run sets it")
    return _Source(cast("dict[str, object]", flags), flag, text=True)


def flag(name: str) -> str:
    """How `shoal run` is told this setting."""
    return f"flag --{name.replace('_', '-')}" if name in OPTIONS else f"flag --set {name}"


def _known(name: str, known: Mapping[str, object] | tuple[str, ...], shown: str) -> None:
    if name not in known:
        raise SettingError(f"unknown {shown}", remedy=nearest(name, known))


def _fitting(name: str, value: object, origin: str, *, text: bool) -> object:
    """The value in the setting's own type."""
    field = Settings.model_fields[name]
    said_none = text and value == "none" and name in ("leaves", "ranks_per_copy", "memory", "device", "interface")
    try:
        settings = Settings.model_validate({name: None if said_none else value}, strict=not text)
        return getattr(settings, name)
    except ValidationError as error:
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        remedy = nearest(str(value), choices) if choices else f"{name}: {field.description}"
        reasons = dict.fromkeys(reason["msg"] for reason in error.errors())
        raise SettingError(
            f"{name}={value!r} ({origin}) does not fit", cause=", or: ".join(reasons), remedy=remedy
        ) from None


def _shown(value: object) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
