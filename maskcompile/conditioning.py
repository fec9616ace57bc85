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

#: A tensor's memory, the offset in it, and the strides.
Place = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class Conditioning:
    """The tensors of a trajectory's last call that tell it apart, as they were given.

    places: which of the call's tensors they are. where: the memory of each, the offset in it and the strides. memory, objects:
    weak references, with which nothing else takes the place of what is gone. same: whether each was the same one call before.
    """

    places: tuple[int, ...]
    where: tuple[Place, ...]
    memory: tuple[StorageWeakRef, ...]
    objects: tuple[ref[Tensor], ...]
    same: tuple[bool, ...]

    @staticmethod
    def first(tensors: Sequence[Tensor], places: Sequence[int], seen: Sequence[Conditioning]) -> Conditioning:
        """That of a trajectory's first call. seen: of the calls at the step before, whichever trajectory they were of."""
        now = _where(tensors, places)
        alike = [known.where for known in seen if known.places == tuple(places)]
        return Conditioning._of(tensors, places, [any(known[i] == here for known in alike) for i, here in enumerate(now)])

    @staticmethod
    def _of(tensors: Sequence[Tensor], places: Sequence[int], same: Sequence[bool]) -> Conditioning:
        memory = tuple(StorageWeakRef(tensors[place].untyped_storage()) for place in places)
        objects = tuple(ref(tensors[place]) for place in places)
        return Conditioning(tuple(places), _where(tensors, places), memory, objects, tuple(same))

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
        return Conditioning._of(tensors, self.places, [here == before for here, before in zip(now, self.where, strict=True)])

    def _very_same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are the same objects, which most loops hand on."""
        for place, known in zip(self.places, self.objects, strict=True):  # noqa: SIM110  all(...) takes twice as long
            if known() is not tensors[place]:
                return False
        return True


def _where(tensors: Sequence[Tensor], places: Sequence[int]) -> tuple[Place, ...]:
    found = [tensors[place] for place in places]
    return tuple((t.untyped_storage()._cdata, int(t.storage_offset()), t.stride()) for t in found)
