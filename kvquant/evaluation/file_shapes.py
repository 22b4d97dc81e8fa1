"""What is read of the files of reports beside their rows: what reports keep as plain builtins is checked by it."""

from __future__ import annotations

from typing import Any, TypedDict


class Machine(TypedDict):
    """What `describe_machine` says of a machine; there may be more, such as versions of libraries."""

    cpu: str
    cores: int | None
    threads: int
    load: float | None
    device: str
    python: str
    kvquant: str
    torch: str
    transformers: str


class _Settings(TypedDict):
    caches: dict[str, dict[str, Any]]


class EvaluationFile(TypedDict):
    """What a file of any evaluation has beside its report's rows, as far as pictures and tables read it."""

    machine: Machine
    model: str
    settings: _Settings


class _AttentionSettings(_Settings):
    queries: int


class AttentionFile(TypedDict):
    """The same of `kvquant eval attention`."""

    machine: Machine
    model: str
    settings: _AttentionSettings


class _RateDistortionSettings(_Settings):
    states: list[str]
    streams: list[str]
    tokens: int
    heads: int
    head_dim: int
    device: str
    seed: int


class RateDistortionFile(TypedDict):
    """The same of `kvquant rate-distortion`."""

    machine: Machine
    model: str
    settings: _RateDistortionSettings


class _PlannedModel(TypedDict):
    architecture: str
    dtype: str
    positions: int | None


class _PlannedWeights(TypedDict):
    nbytes: int
    parameters: int
    how: str


class _PlanSettings(_Settings):
    model: _PlannedModel
    weights: _PlannedWeights
    context: int
    decode: int
    batch: int
    memory: int | None
    overhead: int


class PlanFile(TypedDict):
    """The same of `kvquant plan`."""

    machine: Machine
    model: str
    settings: _PlanSettings


class _Bits(TypedDict):
    bits: float
    memory: int | None


class _TuneBudget(_Bits, total=False):  # what there is only where memory is the budget
    left: float
    weights: int
    overhead: int
    context: int
    batch: int
    takes: dict[str, int]


class _TuneSettings(_Settings):
    base: dict[str, Any]
    widths: list[float]
    widest: float
    length: int
    prefill: int
    windows: int
    verify: int
    budget: _TuneBudget


class TuneFile(TypedDict):
    """The same of `kvquant tune`."""

    machine: Machine
    model: str
    settings: _TuneSettings


class _BenchModel(TypedDict):
    name: str
    architecture: str | None
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


class BenchFile(TypedDict):
    """The same of `kvquant bench`."""

    machine: Machine
    model: _BenchModel
