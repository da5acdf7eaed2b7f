"""The code of the sections on quantization after training in docs/quantization.md runs."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "quantization.md"


def test_the_code_of_the_sections_runs(capsys):
    text = PAGE.read_text()
    sections = text[text.index("## After training") : text.index("## What qat's options")]
    code = "".join(re.findall(r"^```python\n(.*?)^```", sections, re.M | re.S))
    namespace = {"__name__": "docs"}
    exec(compile(code, "docs/quantization.md: After training", "exec"), namespace)
    assert set(namespace["decibels"]) > {"conv/kernel", "dense/kernel", "head/kernel"}
    assert all(x > 0 for x in namespace["ranges"])
    assert "conv/kernel" in capsys.readouterr().out
