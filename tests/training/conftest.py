import pytest


@pytest.fixture
def small_corpus(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small corpus, so that no test needs the real one: two books of a few hundred words."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus").mkdir()
    paragraph = "The fox {} and the king {} went to the mill, and the {} miller gave them bread for a song.\n\n"
    book = "THE FOX AND THE KING\n\n" + "".join(paragraph.format(i, i * i, "old" * (i % 3)) for i in range(60))
    (folder / "corpus" / "fairy_tales.txt").write_text(f"{book.strip()}\n\n\n{book.strip()}\n")
    monkeypatch.setenv("SPARING_DATA", str(folder))
