"""What the compiled HLO text says: the Pallas calls, and the cost of XLA's own work beside them."""

import re
from dataclasses import dataclass

_CALL = re.compile(r"%([\w.\-]+) = [^\n]*? custom-call\(")
_WALKED = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')
_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
_COST = re.compile(r'"estimated_cycles":"(\d+)","iteration_bounds"')


@dataclass(frozen=True)
class PallasCall:
    """walk_cycles: libtpu's own evaluation, None unless it was asked for."""

    name: str
    vmem_bytes: int | None
    walk_cycles: int | None


def pallas_calls(hlo: str) -> list[PallasCall]:
    """The Pallas calls of an optimised module, in the order of its text."""
    found = []
    matches = list(_CALL.finditer(hlo))
    ends = [*(match.start() for match in matches[1:]), len(hlo)]
    for match, end in zip(matches, ends, strict=False):
        text = hlo[match.start() : end]
        # The target stands before the metadata; further on another computation may begin.
        if '"tpu_custom_call"' not in text.split("metadata=")[0]:
            continue
        vmem, walked = _VMEM.search(text), _WALKED.search(text)
        found.append(
            PallasCall(match[1], int(vmem[1]) if vmem else None, int(walked[1]) if walked else None)
        )
    return found


def xla_cycles(hlo: str) -> int:
    """XLA's cost model for the entry computation's own instructions, kernels left out.

    It prices the sum of a large array's parts at several times what the memory needs for it.
    """
    start = hlo.find("\nENTRY ")
    return sum(map(int, _COST.findall(hlo[start:]))) if start >= 0 else 0
