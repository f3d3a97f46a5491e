"""The corpus: two splits of what ships with an interpreter, and nothing of this machine."""

import sysconfig

import pytest
from python_corpus import Document, documents, split_of


def test_splits_share_no_document_and_one_in_twenty_is_held_out() -> None:
    paths = {split: {doc.path for doc in documents(split)} for split in ("train", "heldout")}
    assert not paths["train"] & paths["heldout"]
    share = len(paths["heldout"]) / len(paths["train"] | paths["heldout"])
    assert 0.03 < share < 0.07


def test_split_depends_on_the_path_alone() -> None:
    assert documents("heldout") == documents("heldout")
    assert split_of("sched.py") == split_of("topics/execmodel.txt") == "heldout"
    assert split_of("asyncio/queues.py") == split_of("pydoc/builtins.txt") == "train"


def test_corpus_has_sources_topics_and_module_pages_but_nothing_of_this_machine() -> None:
    texts = {doc.path: doc.text for doc in documents("train")}
    assert {"asyncio/queues.py", "topics/lambda.txt", "pydoc/zlib.txt"} <= texts.keys()
    assert not any(path.startswith("_sysconfigdata") for path in texts)
    assert not any(sysconfig.get_paths()["stdlib"] in text for text in texts.values())
    pages = [text for path, text in texts.items() if path.startswith("pydoc/")]
    assert not any("environ = " in page for page in pages)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("test/test_os.py", True), ("encodings/cp1252.py", True), ("unittest/case.py", False)],
)
def test_tests_and_tables_are_told_from_what_people_read(path: str, expected: bool) -> None:
    assert Document(path, "").is_test_or_table is expected
