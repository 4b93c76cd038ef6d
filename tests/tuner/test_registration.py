import copy
import importlib
import json
import pickle
import subprocess
import sys

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import hf_maskpro
from hf_maskpro.tuner.registration import add_peft_type


def test_member_of_the_enum():
    member = PeftType("MASKPRO")
    assert member is PeftType.MASKPRO
    assert member is PeftType["MASKPRO"]
    assert list(PeftType).count(member) == 1
    assert member in PeftType
    assert isinstance(member, PeftType)
    assert member == "MASKPRO"
    assert (member.name, member.value) == ("MASKPRO", "MASKPRO")
    assert len(list(PeftType)) == len(PeftType.__members__)


def test_copies_and_serialisation_give_the_same_object():
    member = PeftType.MASKPRO
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert copy.copy(member) is member
    assert json.dumps(member) == '"MASKPRO"'


def test_adding_twice_and_importing_again():
    assert add_peft_type() is add_peft_type()
    before = len(list(PeftType))
    importlib.reload(sys.modules["hf_maskpro.tuner"])
    assert len(list(PeftType)) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MASKPRO] is hf_maskpro.MaskProConfig


def test_a_member_that_peft_ships_itself_is_used():
    program = """
import enum, peft.utils.peft_types as types
names = {name: member.value for name, member in types.PeftType.__members__.items()} | {"MASKPRO": "MASKPRO"}
Shipped = enum.Enum("PeftType", names, type=str)
import peft.utils
peft.utils.PeftType = Shipped
from hf_maskpro.tuner.registration import add_peft_type
assert add_peft_type() is Shipped.MASKPRO and len(Shipped) == len(names)
"""
    program = program.replace(
        "from hf_maskpro.tuner.registration", "import sys; sys.path.insert(0, 'PATH')\nfrom registration"
    )
    folder = str(importlib.import_module("hf_maskpro.tuner").__path__[0])
    subprocess.run([sys.executable, "-c", program.replace("PATH", folder)], check=True)
