"""What a report holds: one header line, then one line a tensor (see docs/report.md)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SCHEMA_VERSION = "1"

Action = Literal["edited", "averaged", "kept", "copied"]
ACTIONS: tuple[Action, ...] = ("edited", "averaged", "kept", "copied")
# The reason of an edit that had nothing to edit.
ZERO_UPDATE = "zero update"


def _finite_or_none(value: Any) -> Any:
    """JSON has neither NaN nor infinity; what is not defined is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, BeforeValidator(_finite_or_none)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputFile(_Line):
    """One file of an input checkpoint."""

    size: int = Field(description="bytes")
    sha256: str | None = Field(default=None, description="of the whole file; null where it was not computed")


class InputModel(_Line):
    """One input checkpoint."""

    model: str = Field(description="as the recipe names it")
    role: Literal["base", "finetuned"]
    revision: str | None = Field(default=None, description="commit on the Hub; null for local folders")
    files: dict[str, InputFile] = Field(default_factory=dict)


class ReportHeader(_Line):
    """First line of a report: what went in and under which conditions."""

    kind: Literal["header"] = "header"
    schema_version: str = SCHEMA_VERSION
    created: str = Field(description="UTC, ISO 8601")
    method: str | None = Field(default=None, description="merge method, or `inspect`")
    versions: dict[str, str] = Field(description="of Python and of the packages that take part")
    inputs: tuple[InputModel, ...] = ()
    configuration: str | None = Field(
        default=None, description="the recipe as it was written; null where the method cannot know it"
    )
    seed: int | None = None
    device: str | None = None


class SpectrumCurve(_Line):
    """A singular-value spectrum at a few dozen of its indices; all three lists have the same length."""

    index: tuple[int, ...] = Field(description="i, from 1 to r")
    value: tuple[float, ...] = Field(description="s_i / s_1")
    energy: tuple[float, ...] = Field(description="sum_{j<=i} s_j^2 / sum_j s_j^2")


class TensorRecord(_Line):
    """What was found and done in one output tensor.

    Of a stack of experts the figures are means over its matrices, but for the norms, which are those
    of the whole tensor. Null: not defined for this action, or not measured.
    """

    kind: Literal["tensor"] = "tensor"
    tensor: str = Field(description="name in the output")
    shape: tuple[int, ...]
    dtype: str = Field(description="of the inputs as the method received them")
    action: Action
    reason: str = ""
    method: str | None = None
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="of the method, for this tensor; defaults are left out"
    )
    backend: str | None = Field(default=None, description="how the singular values were obtained")
    matrices: int | None = Field(default=None, description="matrices of the matrix view with an update")
    r: int | None = Field(default=None, description="min(rows, columns)")
    k: Figure = Field(default=None, description="split index")
    effective_rank: Figure = Field(default=None, description="exp H of the singular values")
    p_k: Figure = Field(default=None, description="P_k = sum_{i<=k} s_i^2 / sum_i s_i^2")
    rho: Figure = Field(default=None, description="(s_{k+1} / s_1)^2, 0 when k = r")
    cos_alpha: Figure = Field(default=None, description="||dW_low|| / ||dW||")
    lambda_low: Figure = None
    lambda_high: Figure = None
    update_norm: Figure = Field(default=None, description="||dW||_F before the edit")
    relative_update: Figure = Field(default=None, description="||dW||_F / ||W0||_F")
    noise: Figure = Field(default=None, description="noise level sigma of a Donoho-Gavish split")
    threshold: Figure = Field(default=None, description="tau, above which singular values count as signal")
    rounding_share: Figure = Field(
        default=None,
        description="estimated norm of what rounding the fine-tuned weights changed in dW, over ||dW||_F",
    )
    edit_survival: Figure = Field(
        default=None,
        description="<W_written - W1, E> / <E, E> with E = W_edited - W1 before rounding; one fine-tuned "
        "checkpoint only, null where E = 0",
    )
    stored_dtypes: tuple[str, ...] = Field(
        default=(), description="coarsest that hold the values exactly; base first"
    )
    seconds: Figure = None
    sha256: str | None = Field(
        default=None, description="of the tensor's bytes as written; null where no file was written"
    )
    node: str | None = Field(default=None, description="of the cluster that did it; null in a local run")
    figures: dict[str, Figure] = Field(default_factory=dict, description="of the method's own")
    spectrum: SpectrumCurve | None = Field(
        default=None, description="of a stack of experts, that of the first; null where none was decomposed"
    )
    sweep: dict[str, dict[str, Figure]] = Field(
        default_factory=dict, description="written by `inspect --energy`: the split at other R"
    )
    cosines: dict[str, Figure] = Field(
        default_factory=dict, description="between the updates of two fine-tuned checkpoints"
    )

    def line(self) -> str:
        """Return the record as a line of JSON, without the fields at their default."""
        return '{"kind":"tensor",' + self.model_dump_json(exclude_defaults=True)[1:]
