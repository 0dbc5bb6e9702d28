"""The memory of output items, which later requests of the same tenant may name by their ids."""

import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

from sagellm.gateway.answers.responses_objects import (
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
)
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.responses_fields import (
    FunctionCallItem,
    InputItem,
    InputMessage,
    ReasoningItem,
    ReasoningPart,
)

MAX_BYTES = 16 << 20  # of the items of all tenants
TENANT_BYTES = MAX_BYTES // 4  # of the items of one tenant
ITEM_BYTES = 1 << 20  # of one item
ENTRY_BYTES = 1024  # of an item besides its texts: its objects, its id, its places in the memory
_OWN_ID = re.compile(r"(msg|rs|fc)_[0-9a-f]{32}_[0-9]{1,6}")


class KeptItem(NamedTuple):
    """An output item as a client sends it back, and its size in memory."""

    item: InputItem
    num_bytes: int


@dataclass(slots=True)
class _Share:
    """The ids of one tenant's items, the least recently used first, and their bytes."""

    ids: OrderedDict[str, None] = field(default_factory=OrderedDict)
    num_bytes: int = 0


class ItemMemory:
    """Keeps items by tenant and id. Where there is no room, the least recently used item goes.

    `num_bytes`: the size of all items.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._items: OrderedDict[tuple[str, str], KeptItem] = OrderedDict()  # as in _Share
        self._shares: defaultdict[str, _Share] = defaultdict(_Share)  # by tenant

    def keep(self, tenant: str, items: Iterable[OutputItem]) -> None:
        """Keep the items of a finished response, except those that are larger than ITEM_BYTES.

        The ids must be new.
        """
        for item in items:
            kept = _kept(item)
            if kept.num_bytes <= ITEM_BYTES:
                self._add(tenant, item.id, kept)

    def find(self, tenant: str, item_id: str) -> KeptItem | None:
        """Return an item, which then is the one used last. Another tenant's item is not found."""
        kept = self._items.get((tenant, item_id))
        if kept is not None:
            self._items.move_to_end((tenant, item_id))
            self._shares[tenant].ids.move_to_end(item_id)
        return kept

    def _add(self, tenant: str, item_id: str, kept: KeptItem) -> None:
        share = self._shares[tenant]
        while share.num_bytes + kept.num_bytes > TENANT_BYTES:
            self._drop(tenant, next(iter(share.ids)))
        while self.num_bytes + kept.num_bytes > MAX_BYTES:
            self._drop(*next(iter(self._items)))
        self._items[tenant, item_id] = kept
        share.ids[item_id] = None
        share.num_bytes += kept.num_bytes
        self.num_bytes += kept.num_bytes

    def _drop(self, tenant: str, item_id: str) -> None:
        kept, share = self._items.pop((tenant, item_id)), self._shares[tenant]
        del share.ids[item_id]
        share.num_bytes -= kept.num_bytes
        self.num_bytes -= kept.num_bytes


class ReferencedItems:
    """Finds the items that one body references, up to a number of bytes.

    `max_bytes`: without this bound, a short body could make a prompt of any length.
    """

    def __init__(self, memory: ItemMemory, tenant: str, max_bytes: int) -> None:
        self._memory = memory
        self._tenant = tenant
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def __call__(self, item_id: str, place: str) -> InputItem:
        """Return the item with an id. Raises ApiError: 404 for an unknown id, 413 beyond the bound.

        `place`: that of the reference in the body.
        """
        kept = self._memory.find(self._tenant, item_id)
        if kept is None:
            raise _unknown(item_id, f"{place}.id")
        self._num_bytes += kept.num_bytes
        if self._num_bytes > self._max_bytes:
            message = f"{place}: the referenced items are larger than {self._max_bytes} bytes"
            raise ApiError(413, f"{message} together; reference fewer items", param=place)
        return kept.item


def _unknown(item_id: str, param: str) -> ApiError:
    # An id of another form may be text of the user's.
    named = f"Item with id '{item_id}'" if _OWN_ID.fullmatch(item_id) else "Item with this id"
    message = (
        f"{param}: {named} not found. Items are kept for a while, in one gateway process, and only "
        "those of your own responses without `store`: false. Send the item itself; many clients "
        "do so with `store`: false."
    )
    return ApiError(404, message, param=param, code="item_not_found")


def _kept(item: OutputItem) -> KeptItem:
    match item:
        case OutputMessage():
            text = "".join(part.text for part in item.content)
            return _sized(InputMessage(role="assistant", content=text), text)
        case OutputReasoning():
            parts = [ReasoningPart(text=part.text) for part in item.content]
            return _sized(ReasoningItem(content=parts), *(part.text for part in parts))
        case OutputCall():
            call = FunctionCallItem(call_id=item.call_id, name=item.name, arguments=item.arguments)
            return _sized(call, item.name, item.arguments)
        case _:
            assert_never(item)


def _sized(item: InputItem, *texts: str) -> KeptItem:
    return KeptItem(item, ENTRY_BYTES + sum(_num_bytes(text) for text in texts))


def _num_bytes(text: str) -> int:
    """Return the most memory that a text takes: when it is encoded, Python keeps its UTF-8 too."""
    return sys.getsizeof(text) + (0 if text.isascii() else len(text.encode()))
