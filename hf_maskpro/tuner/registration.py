"""Makes `PeftType.MASKPRO` a member of PEFT's enum, and maps it to this package's config and model."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


NAME = "MASKPRO"


def add_peft_type() -> PeftType:
    """
    Return `PeftType.MASKPRO`, adding it to the enum unless PEFT already has a member of that name.

    Enums are closed to subclassing and assignment, so the member is entered where `enum` itself keeps members. Since
    Python 3.12 attribute access reads the class alone, which `EnumType.__setattr__` guards: hence `type.__setattr__`.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT; importing the package anew replaces the earlier classes."""
    peft_type = add_peft_type()
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(peft_type, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
