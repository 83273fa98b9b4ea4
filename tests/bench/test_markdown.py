"""Sections of a page are replaced whole, and nothing else is touched."""

from herd.bench.markdown import replaced, section

PAGE = "# Results\n\nWords.\n\n## Engine\n\nold\n\n### Sub\n\nold\n\n## Engines of others\n\nkept\n"


def test_one_section_is_replaced():
    new = replaced(PAGE, "Engine", "new\n")
    assert new == "# Results\n\nWords.\n\n## Engine\n\nnew\n\n## Engines of others\n\nkept\n"
    assert replaced(new, "Engine", "new") == new


def test_a_new_section_comes_last():
    assert replaced("# Results\n\nWords.\n", "Engine", "new") == "# Results\n\nWords.\n\n## Engine\n\nnew\n"
    assert replaced(replaced("# R\n", "Engine", "one"), "Engine", r"two \1") == "# R\n\n## Engine\n\ntwo \\1\n"


def test_a_report_becomes_tables():
    machine = {
        "cpu": "A CPU",
        "instructions": ["avx2"],
        "cores": 2,
        "memory_gib": 24.0,
        "python": "3.11",
        "versions": {"torch": "2.13"},
        "commit": None,
        "date": "2026-11-21 10:00:00",
        "command": "python benchmarks/engine.py",
        "load": [0.1, 0.1, 0.1],
        "load_after": [0.2, 0.1, 0.1],
    }
    plan = {"task": "decode", "model": "m", "prompt": 128, "tokens": 64, "threads": 2, "runs": 5, "batches": [1]}
    row = {
        "who": "herd",
        "weights": "Q4_0",
        "batch": 1,
        "tokens_per_s": 40.0,
        "min": 39.0,
        "max": 41.0,
        "gb_per_s": 20.0,
    }
    row |= {"share": 0.9, "resident_bytes": 10**9, "others": 0.01, "tokens_per_cpu_s": 21.0, "times": None}
    peer = row | {"who": "llama.cpp", "tokens_per_s": 20.0, "times": 2.0, "resident_bytes": None}
    limit = {"gb_per_s": 22.0, "gop_per_s": {"int8": 800.0, "bfloat16": 300.0, "float32": 100.0}}
    text = section([{"machine": machine, "plan": plan, "limits": {"Q4_0": limit}, "rows": [row, peer]}])
    assert "| herd | Q4_0 | 40.0 | 39.0, 41.0 | 21.0 | 20.0 | 0.90 | 1.00 | 1% | |" in text
    assert "| llama.cpp | Q4_0 | 20.0 | 39.0, 41.0 | 21.0 | 20.0 | 0.90 | | 1% | 2.00x |" in text
    assert "load average 0.1 before, 0.2 after" in text
