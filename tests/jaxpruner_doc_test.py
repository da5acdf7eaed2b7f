"""The page for people who come from jaxpruner: its links lead somewhere, and its code trains."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "jaxpruner.md").read_text()


def test_every_link_is_a_file():
    links = re.findall(r"\]\((\.\.[^)]*)\)", PAGE)
    assert len(links) > 30
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_every_name_of_effjax_exists():
    import effjax as ej

    names = re.findall(r"`(?:ej\.)?((?:prune|schedules|budgets|patterns)\.[a-z_.]+)", PAGE)
    assert len(names) > 25
    for name in names:
        found = ej if name.split(".")[0] in ("prune", "schedules") else ej.prune
        for part in name.split("."):
            assert hasattr(found, part), name
            found = getattr(found, part)


def test_the_loop_prunes_to_the_sparsity_asked_for():
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE, re.M | re.S)
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    names: dict = {}
    exec(compile(code, "docs/jaxpruner.md", "exec"), names)
    zeros = sum(int((names["params"][n]["kernel"] == 0).sum()) for n in ("hidden", "out"))
    assert abs(zeros - round(0.8 * 2 * 64 * 32)) <= 1
    assert names["params"]["hidden"]["bias"].all()
