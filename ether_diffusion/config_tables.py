"""A section of a config that is one entry of a table of settings classes; one of its keys says which."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Union

import pydantic
from pydantic_core import core_schema


class EntryOf:
    """Annotates a field: `adapter: Annotated[MethodSettings, EntryOf(METHODS, "method")]`.

    The table is looked up whenever a section is checked, not when the config's class is made: any module may add an
    entry later. The faults are those of pydantic's discriminated union.

    Args:
        table: Settings classes by the value of their key.
        discriminator: The key, a field with one `Literal` value in each class.
    """

    def __init__(self, table: Mapping[str, type[pydantic.BaseModel]], discriminator: str) -> None:
        self.table, self.discriminator = table, discriminator

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        lax, strict = (
            core_schema.with_info_plain_validator_function(functools.partial(self._validate, strict=strict))
            for strict in (None, True)
        )
        return core_schema.lax_or_strict_schema(lax, strict)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return handler(_adapter(tuple(self.table.values()), self.discriminator).core_schema)

    def _validate(self, value: Any, info: core_schema.ValidationInfo, strict: bool | None) -> Any:
        adapter = _adapter(tuple(self.table.values()), self.discriminator)
        if info.mode == "json" and not isinstance(value, pydantic.BaseModel):  # a default is a model in either mode
            return adapter.validate_json(json.dumps(value), strict=strict)
        return adapter.validate_python(value, strict=strict)


@functools.cache
def _adapter(classes: tuple[type[pydantic.BaseModel], ...], discriminator: str) -> pydantic.TypeAdapter[Any]:
    union: Any = Annotated[Union[classes], pydantic.Field(discriminator=discriminator)]  # noqa: UP007
    return pydantic.TypeAdapter(union)
