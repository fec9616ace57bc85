"""What a trajectory is given beside the noisy sample and the timestep: a prompt, guidance, sizes.

A sampling loop hands the same tensors to all calls of a trajectory, or makes them anew for every call. So a tensor that was
the same at the last two calls and is another one now says that the call belongs to another trajectory: guidance in separate
calls that is switched on or off, another picture after one that was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class Conditioning:
    """The tensors of a trajectory's last call that tell it apart.

    places: which of the call's tensors they are. where: the memory of each and the offset in it. memory, objects: weak
    references, with which nothing else takes the place of what is gone. same: whether each was the same one call before.
    """

    places: tuple[int, ...]
    where: tuple[tuple[int, int], ...]
    memory: tuple[StorageWeakRef, ...]
    objects: tuple[ref[Tensor], ...]
    same: tuple[bool, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor], places: Sequence[int], same: Sequence[bool] | None = None) -> Conditioning:
        """That of a trajectory's first call, or of another one, given whether each is what it was."""
        memory = tuple(StorageWeakRef(tensors[place].untyped_storage()) for place in places)
        objects = tuple(ref(tensors[place]) for place in places)
        known = (False,) * len(places) if same is None else tuple(same)
        return Conditioning(tuple(places), _where(tensors, places), memory, objects, known)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a call with these tensors can be of the same trajectory."""
        if self._very_same(tensors):
            return True
        now = _where(tensors, self.places)
        return not any(same and here != before for same, here, before in zip(self.same, now, self.where, strict=True))

    def after(self, tensors: Sequence[Tensor]) -> Conditioning:
        """After a call with these tensors, of the same trajectory."""
        if all(self.same) and self._very_same(tensors):
            return self
        now = _where(tensors, self.places)
        return Conditioning.of(tensors, self.places, [here == before for here, before in zip(now, self.where, strict=True)])

    def _very_same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are the same objects, which most loops hand on."""
        for place, known in zip(self.places, self.objects, strict=True):  # noqa: SIM110  all(...) takes twice as long
            if known() is not tensors[place]:
                return False
        return True


def _where(tensors: Sequence[Tensor], places: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((tensors[place].untyped_storage()._cdata, int(tensors[place].storage_offset())) for place in places)
