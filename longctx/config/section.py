"""What every section of a config is made of. Imports no torch."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from longctx.config.humanint import parse_int

Count = Annotated[int, BeforeValidator(parse_int, json_schema_input_type=int | str), Field(gt=0)]
NonNegative = Annotated[int, BeforeValidator(parse_int, json_schema_input_type=int | str), Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    def idle(self) -> dict[str, str]:
        """Fields without effect beside the values of the others, and why; setting one of them is a fault."""
        return {}
