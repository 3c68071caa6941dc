import pytest

from lethescope.errors import InputError
from lethescope.facts import of_split, read_facts
from lethescope.models import load
from lethescope.subjects import shipped
from lethescope.subjects.people import audit_facts, people


def test_shipped_facts_are_those_of_the_generator():
    assert read_facts(shipped("facts")) == audit_facts(people(seed=0))


def test_shipped_files_stay_small():
    files = [path for path in shipped("facts").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6


@pytest.mark.parametrize("name", ["original", "unlearned", "reference"])
def test_shipped_models_load_with_one_vocabulary(name):
    model = load(shipped(name))
    assert model.vocabulary == load(shipped("original")).vocabulary
    ids = model.tokenizer(of_split(read_facts(shipped("facts")), "forget")[0].prompt)["input_ids"]
    assert model.tokenizer.unk_token_id not in ids


def test_unknown_name_is_refused():
    with pytest.raises(InputError, match="original, unlearned, reference, facts"):
        shipped("retain")
