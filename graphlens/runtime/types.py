"""Types for the parts of ONNX Runtime that graphlens uses: ONNX Runtime declares none itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]
Callback = Callable[[Array], Array]  # activation -> the activation to go on with


class DeviceValue(Protocol):
    """A tensor on the device that computed it (``onnxruntime.OrtValue``). It can be fed to a later run as it is."""

    def numpy(self) -> Array:
        """The tensor as an array: over the same memory on the CPU, a copy from any other device."""

    def shape(self) -> Sequence[int]:
        """The sizes of the tensor's axes."""

    def is_tensor(self) -> bool:
        """False for a sequence, an optional value or a map."""

    def data_type(self) -> str:
        """Its type in ONNX Runtime's words: "tensor(float)"."""


# What a run takes for one of its inputs.
Feed = Array | DeviceValue


class NodeArg(Protocol):
    """An input or output of a session."""

    @property
    def name(self) -> str:
        """Its name in the graph."""

    @property
    def type(self) -> str:
        """Its type in ONNX Runtime's words: "tensor(float)"."""

    @property
    def shape(self) -> Sequence[int | str | None]:
        """Its sizes: numbers, names, or None for those of which nothing is known. Without any also where the rank is not."""


class HasProviders(Protocol):
    """A session, as far as its execution providers are concerned."""

    def get_providers(self) -> list[str]:
        """The active providers, first choice first."""


class InferenceSession(HasProviders, Protocol):
    """``onnxruntime.InferenceSession``."""

    def get_inputs(self) -> Sequence[NodeArg]:
        """The inputs that must be fed."""

    def get_overridable_initializers(self) -> Sequence[NodeArg]:
        """The inputs that may be fed and have a default."""

    def get_outputs(self) -> Sequence[NodeArg]:
        """The outputs."""

    def run_with_ort_values(
        self, output_names: Sequence[str], input_dict_ort_values: Mapping[str, DeviceValue], run_options: RunOptions
    ) -> list[DeviceValue]:
        """Runs the graph; the outputs stay where they were computed."""


class RunOptions(Protocol):
    """``onnxruntime.RunOptions``."""

    log_severity_level: int
    terminate: bool


class SessionOptions(Protocol):
    """``onnxruntime.SessionOptions``."""

    log_severity_level: int
    optimized_model_filepath: str
    intra_op_num_threads: int
    graph_optimization_level: object
    enable_cpu_mem_arena: bool
    enable_mem_pattern: bool
    execution_order: object

    def add_session_config_entry(self, key: str, value: str) -> None:
        """Sets one of the settings that have no attribute."""

    def add_external_initializers(self, names: Sequence[str], values: Sequence[DeviceValue]) -> None:
        """Lets initializers whose data lie in files hold these values instead."""

    def register_custom_ops_library(self, path: str) -> None:
        """Makes the operators of a library known to the session."""
