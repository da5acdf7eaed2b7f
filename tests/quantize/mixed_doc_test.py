"""The code of the section on mixed precision in docs/quantization.md runs."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "quantization.md"


def test_the_code_of_the_section_runs(capsys):
    section = re.search(r"^## Mixed precision\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert section is not None
    code = "".join(re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S))
    namespace = {"__name__": "docs"}
    exec(compile(code, "docs/quantization.md: Mixed precision", "exec"), namespace)
    bits = namespace["by_trying"].bits
    assert set(bits) == {"one/kernel", "two/kernel", "head/kernel"}
    table = capsys.readouterr().out
    assert all(re.search(rf"{path} .* {b} +8\n", table) for path, b in bits.items())
