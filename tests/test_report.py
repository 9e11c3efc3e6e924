"""Reports: tables, refusals, and the page in a real browser."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pvm_jax.evals import pages, report
from pvm_jax.evals.intervals import share
from pvm_jax.evals.results import ResultError, read_records, write_results

SECRETS = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'>"
HOSTILE = f"{SECRETS}<!-- \x00\x1b[31m \u202e\u2028 lone \ud800 half ]]> &lt; 一种"
COUNT = 24


def record(name: str, index: int, seed: int = 0) -> dict:
    """What run `name` answered to question `index`; both runs are wrong at multiples of 5, base at those of 3 too."""
    wrong = index % 5 == 0 or (name == "base" and index % 3 == 0)
    made = {
        "benchmark": "mmstar",
        "protocol": "pvm_reasoning",
        "index": str(index),
        "seed": seed,
        "question": {
            "index": str(index),
            "text": HOSTILE if index == 7 else f"Which shape is the largest of those in picture {index}?",
            "answer": "B",
            "options": {"A": "the circle", "B": "the square", "C": "a triangle | a star"},
            "hint": "",
            "labels": {"category": "geometry" if index % 2 else "counting", "l2": f"level {index % 3}"},
            "fields": {},
        },
        "prompt": f"<image>Which is the largest? ({index})",
        "completion": f"<think>I compare the areas.\nNumber {index}.</think>\n<answer>{'A' if wrong else 'B'}</answer>",
        "tokens": 20 + 11 * index,
        "prompt_tokens": 90,
        "finish_reason": "stop",
        "answer": "A" if wrong else "B",
        "right": not wrong,
        "error": None,
        "judge": None,
    }
    if index == 5 and name == "base":
        made |= {"completion": "", "answer": None}  # unparsed
    if index == 10:
        made |= {
            "completion": "<think>" + "and so on " * 30,
            "answer": None,
            "finish_reason": "length",
        }  # truncated too
    if index == 15:
        made |= {"completion": None, "answer": None, "finish_reason": "", "tokens": 0, "error": "image does not decode"}
    if index == 7:
        made |= {"completion": f"<think>{HOSTILE}</think>{HOSTILE}"}
    return made


def summarise(records: list[dict], benchmark: str = "mmstar") -> dict:
    def of(chosen) -> dict:
        chosen = list(chosen)
        return share(sum(r["right"] for r in chosen), len(chosen))

    def among(test) -> dict:
        return share(sum(map(test, records)), len(records))

    seeds = sorted({r["seed"] for r in records})
    score = of(records)
    score |= {"seeds": {str(s): of(r for r in records if r["seed"] == s)["value"] for s in seeds}, "spread": 0.0126}
    labels = {
        label: {
            value: of(r for r in records if r["question"]["labels"][label] == value)
            for value in sorted({r["question"]["labels"][label] for r in records})
        }
        for label in ("category", "l2")
    }
    edges = (0, 64, 128, 256)
    by_length = [
        {"from": low, "to": high, **of(r for r in records if low <= r["tokens"] < high)}
        for low, high in itertools.pairwise(edges)
    ]
    return {
        "benchmark": benchmark,
        "protocol": "pvm_reasoning",
        "version": 1,
        "samples": len({r["index"] for r in records}),
        "seeds": seeds,
        "metric": "micro",
        "score": score["value"],
        "scores": {"micro": score, "macro": score},
        "by": labels,
        "by_length": by_length,
        "truncated": among(lambda r: r["finish_reason"] == "length"),
        "unparsed": among(lambda r: r["answer"] is None and r["error"] is None),
        "broken": among(lambda r: r["error"] is not None),
        "unjudged": share(0, len(records)),
    }


def write(folder: Path, records: list[dict], benchmark: str = "mmstar", **changes) -> Path:
    records = [r | {"benchmark": benchmark} for r in records]
    about = {"checkpoint": HOSTILE, "checksum": "1234", "dtype": "float32", "options": {"limit": None}}
    return write_results(folder, benchmark, about, summarise(records, benchmark) | changes, records)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    return [write(tmp_path / name, [record(name, i) for i in range(COUNT)]) for name in ("base", "pvm")]


def picture(index: str) -> bytes:
    """A photograph's worth of structure, wider than a thumbnail."""
    y, x = np.mgrid[:300, :400] / 100
    pixels = np.stack([np.sin(x + int(index)), np.cos(y * x), np.sin(y - x)], -1)
    file = io.BytesIO()
    Image.fromarray(np.uint8(127 + 120 * pixels)).save(file, "PNG")
    return file.getvalue()


def images(benchmark: str, index: str) -> list[bytes]:
    return [b"no image"] if index == "15" else [picture(index)] * (2 if index == "7" else 1)


# ---- Tables -----------------------------------------------------------------------------------------------------


def test_all_outputs_say_the_same(files, tmp_path, capsys):
    markdown, out = tmp_path / "report.md", tmp_path / "report.json"
    names = "--names=base,base | PVM"
    report.main([*map(str, files), names, f"--markdown={markdown}", f"--json={out}"])
    text = capsys.readouterr().out
    (part,) = json.loads(out.read_text())
    assert part["header"] == [
        "run",
        "micro (95 % interval)",
        "macro",
        "truncated",
        "unparsed",
        "broken",
        "seeds",
        "samples",
    ]
    # 24 questions; wrong 0, 5, 10, 15, 20 and, for base, 3, 6, 9, 12, 18, 21 too. 1 and 2 unparsed, 1 truncated.
    assert part["rows"][0][1].startswith("54.2 % (") and part["rows"][1][1].startswith("79.2 % (")
    assert part["rows"][0][3:] == ["4.2 % (1)", "8.3 % (2)", "4.2 % (1)", "1", "24"]
    assert part["rows"][1][3:] == ["4.2 % (1)", "4.2 % (1)", "4.2 % (1)", "1", "24"]
    assert part["pairs"] == [
        "base and base | PVM: 24 answers to the same questions, 13 right in both, 0 only in base, 6 only in base | PVM"
    ]
    written = markdown.read_text()
    for row in part["rows"]:
        assert any(all(cell in line for cell in row) for line in text.splitlines())
        assert "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" in written
    assert "| 64-127 | 50.0 % (18.8-81.2), n = 6 | 83.3 % (43.6-97.0), n = 6 |" in written
    assert "| counting |" in written and "| geometry |" in written


def test_a_section_for_each_benchmark_and_names_by_folder(files, tmp_path):
    other = write(
        tmp_path / "pvm", [record("pvm", i, s) for i in range(4) for s in (0, 1, 2)], "ai2d", protocol="other"
    )
    text = report.as_text(report.read_sections([*files, other], ["first", "second"]))
    assert text.count("second") == 4 and "ai2d (other, version 1)" in text  # two rows, two names in the pair's line
    assert "3, spread 1.3 %" in text
    assert [run.name for run in report.read_sections(files)[0].runs] == ["base", "pvm"]


def test_terminals_and_markdown_get_no_control_characters(tmp_path):
    file = write(tmp_path / "x", [record("pvm", 1)], "a\x1b[2J\n|<b>*")
    parts = report.read_sections([file], ["n\x1bame"])
    text, written = report.as_text(parts), report.as_markdown(parts)
    assert "\x1b" not in text and "a\N{REPLACEMENT CHARACTER}[2J" in text
    assert "\x1b" not in written and "\\|&lt;b>\\*" in written


# ---- Refusals ---------------------------------------------------------------------------------------------------


def test_results_that_do_not_compare(files, tmp_path):
    records = [record("pvm", i) for i in range(COUNT)]
    newer = write(tmp_path / "newer", records, version=2)
    with pytest.raises(ResultError, match=r"found pvm_reasoning, version 1 in .* and pvm_reasoning, version 2 in"):
        report.read_sections([files[0], newer])
    other = write(tmp_path / "other", records, protocol="lmms_default")
    with pytest.raises(ResultError, match=r"version 1 in .* and lmms_default, version 1 in .*report them apart"):
        report.read_sections([files[0], other])
    with pytest.raises(ResultError, match="found 'x' twice; pass --names"):
        report.read_sections(files, ["x", "x"])
    with pytest.raises(ResultError, match="expected 2 names, one for each file, got 3"):
        report.read_sections(files, ["x", "y", "z"])
    changed = [r | {"question": r["question"] | {"answer": "C"}} for r in records]
    with pytest.raises(ResultError, match=r"'0' in .* is not that of .*measured on different files"):
        report.read_sections([files[0], write(tmp_path / "changed", changed)])


def test_runs_with_other_settings_are_refused(files):
    for file, rule in zip(files, ("exact", "strict")):
        result = json.loads(file.read_text())
        result["summary"]["task"] = {"rule": rule, "max_new_tokens": 8}
        file.write_text(json.dumps(result))
    with pytest.raises(ResultError, match=r"expected runs with the same settings, but rule of .* is not that of"):
        report.read_sections(files)


def test_files_that_are_missing_or_half_written(files, tmp_path):
    lines = files[0].with_suffix(".jsonl")
    whole = lines.read_text()
    with pytest.raises(ResultError, match=r"none\.json: expected a result file that eval\.py wrote, found none"):
        report.read_sections([tmp_path / "none.json"])
    for content, message in [
        (whole[:-30], "line 24: expected a record of an evaluation"),
        ("".join(whole.splitlines(True)[:20]), "expected 24 samples with seeds .*found 20 records of 20; was the"),
        (whole + whole.splitlines(True)[3], r"found two of \('3', 0\)"),
        (whole.replace('"tokens"', '"token"'), "line 1: expected a record of an evaluation .*token"),
        (whole.replace('"mmstar"', '"mmmu"'), "expected records of mmstar, found 'mmmu'"),
        ("[]\n", "line 1: expected a record of an evaluation"),
    ]:
        lines.write_text(content)
        with pytest.raises(ResultError, match=message):
            report.read_sections(files)
    lines.unlink()
    with pytest.raises(ResultError, match=r"expected the records that eval\.py wrote, found no file"):
        report.read_sections(files)
    files[1].write_text(json.dumps({"summary": {"test_505": {}}}))
    with pytest.raises(ResultError, match=r"expected the result of a benchmark, found no benchmark, .*evals\.compare"):
        report.read_sections(files[1:])
    files[1].write_text('{"summary": ')
    with pytest.raises(ResultError, match="expected JSON, but it does not parse"):
        report.read_sections(files[1:])


def test_the_command_line_prints_one_sentence(files, capsys):
    report.main([*map(str, files)])
    assert "54.2 %" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: nothing\.json: expected a result file"):
        report.main(["nothing.json"])


# ---- The page, without a browser --------------------------------------------------------------------------------


def test_the_data_cannot_leave_its_element(files):
    page = report.as_page(report.read_sections(files))
    start = page.index('id="data">') + len('id="data">')
    data = page[start : page.index("</script>", start)]
    assert data.isascii() and not set("<>&") & set(data)
    (part,) = json.loads(data)
    assert part["samples"]["questions"][7]["text"] == HOSTILE
    assert page.count("</script>") == 2


def test_long_completions_and_many_samples_are_cut_and_said_so(tmp_path):
    long = [record("pvm", i) | {"completion": "x" * 50_000 + "the end"} for i in range(COUNT)]
    page = report.as_page(report.read_sections([write(tmp_path / "pvm", long)]), max_samples=4)
    assert len(page) < 150_000 and "the end" in page and "[... 38007 characters are not on this page ...]" in page
    samples = json.loads(page.split('id="data">')[1].split("</script>")[0])[0]["samples"]
    assert samples["asked"] == 24 and [q["index"] for q in samples["questions"]] == ["0", "6", "12", "18"]


def test_thumbnails_are_small():
    made = pages.thumbnail(picture("3"))
    assert (made["width"], made["height"]) == (400, 300) and len(made["url"]) < 25_000
    assert pages.thumbnail(b"") == {"error": "image: expected an image, got 0 bytes"}


def test_records_survive_odd_line_ends(files):
    assert [r.index for r in read_records(files[0].with_suffix(".jsonl"))] == [str(i) for i in range(COUNT)]


def test_images_come_from_the_file_that_was_evaluated(tmp_path):
    records = [record("pvm", i) for i in range(3)]
    result = write(tmp_path / "pvm", records, "charts")
    rows = [{k: r["question"][k] for k in ("index", "answer")} | {"question": r["question"]["text"]} for r in records]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(str(i)) if i < 2 else b"no image")
        rows[i]["image"] = f"{i}.png"
    data, page = tmp_path / "charts.jsonl", tmp_path / "report.html"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main([str(result), f"--data={data}", f"--out={page}"])
    questions = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])[0]["samples"]["questions"]
    assert [set(q["images"][0]) for q in questions] == [{"url", "width", "height"}] * 2 + [{"error"}]

    rows[1]["question"] = "Another one?"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(SystemExit, match=r"expected the questions of .*charts\.json, but '1' is another one; pass the"):
        report.main([str(result), f"--data=charts={data}", f"--out={page}"])
    rows[1]["question"] = records[1]["question"]["text"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(SystemExit, match="but '2' is not there"):
        report.main([str(result), f"--data=charts={data}", f"--out={page}"])


# ---- The page in a browser --------------------------------------------------------------------------------------


@pytest.fixture
def page(browser, files, tmp_path):
    """Two runs of a benchmark, and two seeds of one run of another."""
    more = write(tmp_path / "pvm", [record("pvm", i, s) for i in range(6) for s in (0, 1)], "ai2d")
    out = tmp_path / "report.html"
    out.write_text(report.as_page(report.read_sections([*files, more], ["base", "base + PVM"]), images))
    browser.set_window_size(1280, 1000)
    browser.get(out.as_uri())
    return browser


def find(page, selector: str):
    return page.find_element("css selector", selector)


def chips(page) -> dict[str, int]:
    found = page.find_elements("css selector", ".chip")
    return {c.get_attribute("data-verdict"): int(c.find_element("css selector", "b").text) for c in found}


def listed(page) -> int:
    return len(page.find_elements("css selector", ".item"))


def press(page, verdict: str) -> int:
    find(page, f".chip[data-verdict={verdict}]").click()
    assert find(page, "#count").text == f"{listed(page)} of 24"
    return listed(page)


def pick(page, selector: str, text: str) -> None:
    page.execute_script(
        "const s = document.querySelector(arguments[0]);"
        "s.value = [...s.options].find((o) => o.text === arguments[1]).value;"
        "s.dispatchEvent(new Event('change'));",
        selector,
        text,
    )


def test_filters(page):
    wrong = {"all": 24, "right": 19, "wrong": 11, "unparsed": 2, "truncated": 1, "broken": 1, "disagreements": 6}
    assert chips(page) == wrong  # in any of the runs
    assert {verdict: press(page, verdict) for verdict in wrong} == wrong
    pick(page, "#run", "base + PVM")
    only = {"all": 24, "right": 19, "wrong": 5, "unparsed": 1, "truncated": 1, "broken": 1, "disagreements": 6}
    assert chips(page) == only and press(page, "wrong") == 5
    pick(page, "#category", "category: geometry")
    assert chips(page)["all"] == 12 and listed(page) == 2  # 5 and 15
    pick(page, "#category", "all")
    find(page, "#search").send_keys("PICTURE 1")
    assert listed(page) == 2  # 10 and 15, of 1 and 10 to 19
    find(page, "#search").send_keys(" nothing has this")
    assert listed(page) == 0 and "No sample fits" in find(page, "#detail").text
    pick(page, "#a", "base + PVM")
    assert chips(page)["disagreements"] == 0


def test_keys_walk_through_samples_and_benchmarks_change(page):
    from selenium.webdriver.common.keys import Keys

    body = find(page, "body")
    body.send_keys("jj")
    assert find(page, ".item[aria-selected=true]").get_attribute("id") == "item2"
    body.send_keys("k")
    shape = find(page, "#list")
    shape.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert shape.get_attribute("aria-activedescendant") == "item3"
    shape.send_keys(Keys.END)
    assert "picture 23" in find(page, "#detail").text
    body.send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "search"
    page.switch_to.active_element.send_keys("j")
    assert find(page, "#search").get_attribute("value") == "j" and listed(page) == 0
    page.switch_to.active_element.send_keys(Keys.BACKSPACE)
    pick(page, "#benchmark", "ai2d")
    assert listed(page) == 12 and "seed 1" in find(page, "#item1").text
    assert "disagreements" not in chips(page)


def test_a_sample_shows_what_was_asked_and_answered(page):
    text = find(page, "#detail").text
    assert "thinking, 30 characters" in text and "I compare the areas" not in text
    find(page, "#detail .answer summary").click()
    assert "I compare the areas" in find(page, "#detail").text
    assert "<answer>A</answer>" in text and "extracted" in text and "✗ wrong" in text
    assert find(page, ".options .gold").text.startswith("B")
    assert page.execute_script("return document.querySelector('#detail img').naturalWidth") == 256
    find(page, "#item15").click()
    assert "PIL does not know this format" in find(page, "#detail").text
    assert "image does not decode" in find(page, "#detail").text
    find(page, "#item10").click()
    assert "without an end" in find(page, "#detail").text and "truncated" in find(page, "#detail").text


def test_hostile_text_stays_text(page):
    find(page, "#item7").click()
    assert SECRETS in find(page, ".question").text and "\u241b[31m" in find(page, ".question").text
    assert page.execute_script("return window.stolen ?? null") is None
    assert len(page.find_elements("css selector", "script")) == 2
    # No message of any kind: no error, and nothing that the Content-Security-Policy had to stop.
    assert page.get_log("browser") == []


def test_it_fits_and_is_drawn(page, tmp_path):
    for width, scheme in ((1280, "light"), (1280, "dark"), (420, "dark")):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        file = tmp_path / f"{scheme}{width}.png"
        assert page.save_screenshot(str(file))
        with Image.open(file) as shot:
            brightness = np.asarray(shot.convert("L")).mean()
        assert (brightness > 200) if scheme == "light" else (brightness < 80)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
