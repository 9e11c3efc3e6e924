"""The page of the analyses: what it holds, how light it is, and how it behaves in a real browser."""

import base64
import dataclasses
import json
import re
from pathlib import Path

import analysis_traces as made
import numpy as np
import pytest
from PIL import Image

from pvm_jax.analysis import files, measures, page

COUNT = 60
"""Tokens of the first sample's answer."""


def runs(layers: tuple[int, ...] = (1, 2)) -> list[measures.Run]:
    """A base and a model with PVM on three samples: an image, two images, and text alone."""
    two = (made.picture("image 1", 0, 3, 4), made.picture("image 2", 12, 4, 2))
    texts = [
        made.text(made.words(COUNT), (made.picture("image 1", 0, 6, 6),)),
        made.text(made.words(12), two, "second"),
        made.text(made.words(10), (), "text alone"),
    ]
    base = made.run("base", [made.trace(t, 1, (), ("The checkpoint has no PVM.",)) for t in texts])
    return [base, made.run("base + PVM", [made.trace(t, 2, layers) for t in texts])]


def data_of(written: str) -> dict:
    return json.loads(written.split('id="data">')[1].split("</script>")[0])


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def halves(text: str) -> np.ndarray:
    """As the page's script reads them."""
    codes = np.frombuffer(base64.b64decode(text), "<u2").astype(int)
    numbers = np.where(codes > 0, 2.0 ** ((codes >> 10) - 40) * (1 + codes % 1024 / 1024), 0)
    return np.select([codes == 2**16 - 1, codes == 2**16 - 2], [np.nan, np.inf], numbers)


# ---- The numbers ------------------------------------------------------------------------------------------------


def test_the_page_the_file_and_the_table_say_the_same(tmp_path, capsys):
    both = runs()
    names = files.write(tmp_path / "out", both, "about")
    assert names == ["analysis.json", "dilution.png", "index.html", "logit_lens.png", "maps.npz", "pvm.png"]
    content = json.loads((tmp_path / "out/analysis.json").read_text())
    data = data_of((tmp_path / "out/index.html").read_text())
    assert content["table"]["rows"] == data["rows"] == measures.table(both)
    text = measures.as_text(measures.table(both))
    assert all(cell in text for row in data["rows"] for cell in row)
    for r in range(2):
        for s in range(3):
            trace, stored, shown = both[r].traces[s], content["runs"][r]["samples"][s], data["samples"][s]["runs"][r]
            assert stored["tokens"] == shown["tokens"] and len(stored["tokens"]) == len(trace.text.columns)
            for line, drawn in zip(stored["visual_mass"], shown["mass"], strict=True):
                mean = line["label"].startswith("mean")
                got, close = (floats(drawn["values"]), 1e-5) if mean else (halves(drawn["halves"]), 5e-4)
                np.testing.assert_allclose(line["values"], got, rtol=close)
                assert line["fit"] == drawn["fit"]
            np.testing.assert_allclose(np.ravel(stored["lens"]["kl"]), halves(shown["lens"]["kl"]), rtol=5e-4)
            words = np.frombuffer(base64.b64decode(shown["lens"]["token"]), "<u2")
            expected = [both[r].words[token] for token in trace.lens.token.ravel()]
            assert [shown["lens"]["words"][place] for place in words] == expected
            assert stored["lens"]["settled"] == floats(shown["lens"]["settled"]).tolist() == [2] * len(shown["tokens"])
    first = both[1].traces[0]
    exact = first.dilution.visual_mass.mean((0, 1))
    np.testing.assert_allclose(content["runs"][1]["samples"][0]["visual_mass"][0]["values"], exact, rtol=1e-5)
    with np.load(tmp_path / "out/maps.npz") as arrays:
        np.testing.assert_array_equal(arrays["run1/sample1/retrieval"], both[1].traces[1].maps.retrieval)
        assert "run0/sample0/pvm_entropy" not in arrays and "run0/sample2/visual_mass" in arrays


def test_the_table():
    base, pvm = measures.table(runs())
    values = [measures.numbers(trace) for trace in runs()[0].traces]
    assert base[0] == "base" and base[1] == f"{COUNT + 22} in 3 texts"
    mean = np.mean([values[0]["mass_first"], values[1]["mass_first"]])
    assert base[2] == f"{mean:.3g} (of 2 texts)", "text alone has none"
    assert base[4] == "-0.98 (-1.10 to -0.86, of 1 text)", "that is long enough"
    assert (
        measures.table([dataclasses.replace(runs()[0], traces=runs()[0].traces[:1])])[0][4] == "-0.98 (-1.10 to -0.86)"
    )
    two = measures._exponent([{"exponent": -0.9}, {"exponent": -1.1}], 2)
    assert two == "-1.00 (-2.27 to 0.27 over 2 texts)"  # Student's interval: 12.7 times the standard error
    assert base[6:8] == ["-", "-"] and float(pvm[6].removesuffix(" (of 2 texts)")) < 0.9 and pvm[8] == "2.0 of 3"
    assert pvm[7].endswith(" (of 2 texts)") and measures.ratio(runs()[1].traces[2]) == [], "of text alone it is nothing"


def test_a_map_is_within_a_255th_of_its_maximum():
    both = runs()
    shown = data_of(page.write_page(both, ""))["samples"][0]["runs"][1]
    maps = {m["key"]: m for m in shown["maps"]}
    exact = both[1].traces[0].maps
    expected = {"pvm": exact.retrieval.mean((0, 1)), "pvm 2 1": exact.retrieval[1, 1], "layer 3": exact.attention[3]}
    for key, values in expected.items():
        stored = np.frombuffer(base64.b64decode(maps[key]["data"]), np.uint8).reshape(COUNT, 36)
        scale = floats(maps[key]["scale"])[:, None]
        assert np.abs(stored / 255 * scale - values).max() <= (scale / 254).max()
    assert len(maps) == 1 + 1 + 2 + 4 + 4  # PVM, self-attention, PVM's layers and heads, layers
    numbers = np.float32([0, 1e-11, 0.1, 0.9999, 3, 151_935, np.inf, np.nan, -1e-9, 1e-20, 1e9])
    np.testing.assert_allclose(halves(page._halves(numbers)), [*numbers[:-3], 0, 0, 2**23], rtol=5e-4)


def test_without_pvm_there_is_nothing_of_it():
    base = data_of(page.write_page(runs()[:1], ""))["samples"][0]
    (shown,) = base["runs"]
    assert shown["entropy"] == shown["ratio"] == [] and not [m for m in shown["maps"] if "pvm" in m["key"]]
    assert base["notes"] == ["The checkpoint has no PVM."]
    beside = data_of(page.write_page(runs(), ""))["samples"][0]
    assert beside["notes"] == ["base: The checkpoint has no PVM."]
    both = runs()
    both[1].traces[2] = dataclasses.replace(both[1].traces[2], notes=("No image.",))
    assert measures.notes(both) == ["base: The checkpoint has no PVM.", "text alone: base + PVM: No image."]
    assert measures.notes(both[:1]) == ["The checkpoint has no PVM."]


# ---- Size and refusals ------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_left_out_and_said_so():
    """Single layers' maps first, then the maps of tokens between others, at last tokens; the end stays long."""
    text = made.text(made.words(400), (made.picture("image 1", 0, 6, 6, pixels=200),))
    run = made.run("pvm", [made.trace(text, 0)])
    whole = page.write_page([run], "")
    (sample,) = data_of(whole)["samples"]
    assert len(whole) < 1_000_000 and len(sample["runs"][0]["maps"]) == 8
    assert sample["notes"] == [
        "image 1: scaled to 640 pixels on the longer side, from up to 1200, to keep the page light."
    ]
    shell = len(page.write_page([made.run("pvm", [made.trace(made.text(["a"], ()), 0)])], ""))
    for budget, tokens, every, maps in ((120_000, 400, 1, 3), (60_000, 400, 3, 2), (40_000, 296, 4, 2)):
        small = page.write_page([run], "", budget=budget, image_budget=20_000)
        (sample,) = data_of(small)["samples"]
        (shown,) = sample["runs"]
        assert len(small) - shell < 1.1 * budget + 20_000 + 20 * tokens + 3000
        assert (len(shown["tokens"]), shown["every"], len(shown["maps"])) == (tokens, every, maps)
        assert [m["key"] for m in shown["maps"]][:2] == ["pvm 1", "attention"]
        assert len(floats(shown["maps"][0]["scale"])) == -(-(tokens - 1) // every) + 1
        said = " ".join(sample["notes"])
        assert ("of 400 tokens; analysis.json" in said) == (tokens < 400)
        assert (f"One token in {every} has maps, and so do the first and the last" in said) == (every > 1)
        assert "layers of self-attention; maps.npz has all" in said
        assert ("The page has 1 of 3 maps of PVM, of its layers and heads; maps.npz has all." in said) == (maps == 2)
        assert ("The page has 2 of 3 maps of PVM" in said) == (maps == 3)
        assert "image 1: scaled to" in said and len(sample["images"][0]["url"]) < 20_000


def test_room_is_shared_by_need():
    """What a short text leaves goes to the long one; the runs of a sample have maps at the same tokens."""
    assert page._shares([10.0, 100.0, 400.0], 300.0) == [10, 100, 190]
    assert page._shares([200.0, 100.0, 400.0], 300.0) == [100, 100, 100]
    assert page._shares([1.0, 2.0], 300.0) == [1, 2]
    small, large = (made.picture("image 1", 0, side, side, pixels=8) for side in (2, 20))
    texts = [made.text(made.words(30), (small,)), made.text(made.words(300), (large,), "long")]
    both = [made.run("base", [made.trace(t, 1, ()) for t in texts]), made.run("pvm", [made.trace(t, 1) for t in texts])]
    samples = data_of(page.write_page(both, "", budget=300_000))["samples"]
    assert [[run["every"] for run in sample["runs"]] for sample in samples] == [[1, 1], [3, 3]]
    assert [len(run["maps"]) for run in samples[0]["runs"]] == [5, 8], "all"
    assert [len(run["tokens"]) for run in samples[1]["runs"]] == [300, 300]
    at_fourth = np.frombuffer(base64.b64decode(samples[1]["runs"][1]["maps"][0]["data"]), np.uint8)[4 * 400 : 5 * 400]
    assert at_fourth.argmax() == 4 * 3, "retrieval is at t mod M"


def test_each_run_has_its_own_grid():
    """Two checkpoints that scale one image differently, and a third that does as the first."""
    coarse, fine = made.picture("image 1", 0, 2, 3, pixels=64), made.picture("image 1", 0, 4, 6)
    fine = dataclasses.replace(fine, pixels=coarse.pixels)
    texts = [made.text(made.words(9), (picture,)) for picture in (coarse, fine, coarse)]
    three = [made.run(name, [made.trace(text, 0)]) for name, text in zip("abc", texts)]
    (sample,) = data_of(page.write_page(three, ""))["samples"]
    assert [(run["visual"], run["pictures"][0]["rows"]) for run in sample["runs"]] == [(6, 2), (24, 4), (6, 2)]
    assert len(sample["images"]) == 1, "of one image, once"
    assert len(sample["questions"]) == 1 and sample["questions"][0]["runs"] == ""
    caveat = (
        "first: the runs have different numbers of visual tokens (a 6, b 24, c 6), so that their Ω_V and TVR do not "
        "compare; give all of them the same --min_pixels and --max_pixels, for videos --video_min_pixels and "
        "--video_max_pixels."
    )
    assert sample["notes"][0] == caveat and files.as_json(three, "")["caveats"] == [caveat]
    assert measures.caveats([three[0], three[2]], 0) == []


def test_answers_of_different_length_do_not_compare():
    picture = made.picture("image 1", 0, 2, 2)
    texts = [made.text(made.words(count), (picture,)) for count in (40, 90)]
    short, long = (made.run(name, [made.trace(text, 0)]) for name, text in zip("ab", texts))
    (caveat,) = measures.caveats([short, long], 0)
    assert caveat.startswith(
        "first: the answers of the runs differ in their tokens (a 40 tokens, b 90 tokens), and Ω_V falls"
    )
    assert measures.caveats([short, dataclasses.replace(short, name="b")], 0) == []


def test_without_maps_there_are_curves():
    both = runs()
    plain = [dataclasses.replace(r, traces=[dataclasses.replace(t, maps=None) for t in r.traces]) for r in both]
    sample = data_of(page.write_page(plain, ""))["samples"][0]
    assert all(run["maps"] == [] and run["mass"] and run["pictures"] for run in sample["runs"])
    assert "There are no maps over the image: they were not measured." in sample["notes"]
    assert sample["runs"][1]["entropy"], "which needs no map"


def test_focus_is_relative_to_what_can_be_retrieved():
    """A causal memory: one visual token at first, where nothing can be preferred, then four, then all."""
    of = made.text(made.words(40), (made.picture("image 1", 0, 4, 4),))
    choices = np.repeat(np.int32([0, 1, 4, 16]), 10)
    entropy = np.log(np.maximum(choices, 1))[None, None].astype(np.float32) * 0.5
    trace = made.trace(of, 0)
    found = dataclasses.replace(trace.dilution, pvm_choices=choices, pvm_entropy=entropy)
    trace = dataclasses.replace(trace, dilution=found)
    share = measures.entropy_share(trace)
    assert np.isnan(share[:20]).all()
    np.testing.assert_allclose(share[20:], 0.5, rtol=1e-6)
    assert measures.numbers(trace)["pvm_entropy_share"] == pytest.approx(0.5)
    late = dataclasses.replace(trace, dilution=dataclasses.replace(found, pvm_ratio=np.float32(choices > 0)[None] / 2))
    assert measures.numbers(late)["pvm_ratio"] == 0.5, "before the image there is no contribution to be small"
    assert measures.numbers(trace)["pvm_entropy"] == pytest.approx(np.log([1, 4, 16]).mean() / 2)
    one = dataclasses.replace(trace, dilution=dataclasses.replace(found, pvm_choices=np.ones_like(choices)))
    assert measures.table([made.run("one", [one])])[0][6] == "-"
    (sample,) = data_of(page.write_page([made.run("pvm", [trace])], ""))["samples"]
    np.testing.assert_allclose(floats(sample["runs"][0]["uniform"]), np.log([1] * 20 + [4] * 10 + [16] * 10), rtol=1e-6)


def test_the_data_cannot_leave_its_element():
    written = page.write_page(runs(), made.SECRETS)
    start = written.index('id="data">') + len('id="data">')
    data = written[start : written.index("</script>", start)]
    assert data.isascii() and not set("<>&") & set(data)
    assert written.count("</script>") == 2 and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", written)


def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.figures, "draw", lambda runs, folder: (folder / "a.png").write_bytes(b"half of it"))
    monkeypatch.setattr(files, "write_page", broken)
    with pytest.raises(OSError, match="no space"):
        files.write(tmp_path / "out", runs(), "")
    assert list(tmp_path.iterdir()) == []


# ---- In a browser -----------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page of these runs; afterwards the console must be empty."""

    def open_page(of: list[measures.Run], **options):
        file = tmp_path / "index.html"
        file.write_text(page.write_page(of, "about", **options))
        browser.set_window_size(1280, 1000)
        browser.get(file.as_uri())
        return browser

    yield open_page
    assert browser.get_log("browser") == []  # no error, and nothing that the Content-Security-Policy had to stop


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def drawn(browser, panel: int = 1, picture: int = 0) -> str:
    """What the map's canvas shows."""
    return browser.execute_script(
        "return document.querySelectorAll('.run')[arguments[0]].querySelectorAll('canvas')[arguments[1]].toDataURL()",
        panel,
        picture,
    )


def current(browser) -> list[str]:
    return [token.get_attribute("data-token") for token in browser.find_elements("css selector", ".token.now")]


def hover(browser, selector: str, x: int = 0, y: int = 0) -> None:
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", find(browser, selector))
    ActionChains(browser).move_to_element_with_offset(find(browser, selector), x, y).perform()


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def pick(browser, selector: str, value: str) -> None:
    browser.execute_script(
        "const s = document.querySelector(arguments[0]); s.value = arguments[1];s.dispatchEvent(new Event('change'));",
        selector,
        value,
    )


def test_the_map_follows_pointer_and_keys(opened):
    from selenium.webdriver.common.keys import Keys

    browser = opened(runs())
    assert current(browser) == ["0", "0"] and "token 1 of 60" in find(browser, "#position").text
    seen = [drawn(browser)]
    hover(browser, "#token1-20")
    assert current(browser) == ["20", "20"]
    seen.append(drawn(browser))
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert current(browser) == ["21", "21"]
    seen.append(drawn(browser))
    assert seen[0] != seen[1] != seen[2] != seen[0]
    label = find(browser, ".run:nth-child(2) canvas").get_attribute("aria-label")
    assert "token 22" in label and "most in row 4, column 4" in label  # retrieval is at t mod M
    find(browser, "#token0-30").click()  # holds
    hover(browser, "#token0-40")
    assert current(browser) == ["30", "30"] and "held" in find(browser, "#position").text
    find(browser, ".run .text").send_keys(Keys.END)
    assert current(browser) == ["59", "59"]
    find(browser, ".run .text").send_keys(Keys.ARROW_UP, Keys.ENTER)
    assert current(browser) == ["49", "49"] and "held" not in find(browser, "#position").text
    press(browser, "h")
    empty = "const c = document.createElement('canvas'); c.width = c.height = 240; return c.toDataURL()"
    assert drawn(browser) == browser.execute_script(empty)
    hover(browser, ".chart svg", -200, 0)  # a curve moves the token, too
    assert int(current(browser)[0]) < 5


def test_the_number_of_a_cell(opened):
    from selenium.webdriver.common.keys import Keys

    both = runs()
    browser = opened(both)
    exact = both[1].traces[0].maps.retrieval.mean((0, 1))
    hover(browser, ".run:nth-child(2) canvas", -150, -150)
    readout = find(browser, ".run:nth-child(2) .cell")
    assert readout.text.startswith("image 1, row 1, column 1: ") and readout.text.endswith(" of the retrieval")
    assert float(readout.text.split()[-4]) == pytest.approx(exact[0, 0], abs=0.005)
    find(browser, ".run:nth-child(2) canvas").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert "row 2, column 2" in readout.text and current(browser) == ["0", "0"]
    assert float(readout.text.split()[-4]) == pytest.approx(exact[0, 7], abs=0.005)


def test_the_source_of_the_map(opened):
    browser = opened(runs())
    labels = [option.text for option in browser.find_elements("css selector", ".run:nth-child(2) .source option")]
    assert labels[:3] == [
        "PVM, mean of layers and heads",
        "self-attention, mean of layers",
        "PVM layer 1, mean of heads",
    ]
    assert "PVM layer 2, mean of heads" in labels and "self-attention, layer 3" in labels
    assert not [o for o in browser.find_elements("css selector", ".run:first-child .source option") if "PVM" in o.text]
    before, beside = drawn(browser), drawn(browser, panel=0)
    pick(browser, ".run:nth-child(2) .source", "attention")
    assert drawn(browser) != before and drawn(browser, panel=0) == beside
    assert "of the attention" in find(browser, ".run:nth-child(2) .key").text
    press(browser, "m")
    assert find(browser, ".run:nth-child(2) .source").get_attribute("value") == "pvm 1"
    pick(browser, "#scale", "all")
    assert drawn(browser, panel=0) != beside


def test_samples_images_and_text_alone(opened):
    browser = opened(runs())
    press(browser, "]")
    assert find(browser, "#sample").get_attribute("value") == "1"
    assert len(browser.find_elements("css selector", ".run:first-child .picture")) == 2
    assert find(browser, "#question").text.endswith("[image 1][image 2]")
    assert "no fit: a fit needs at least 30 tokens with an image, this text has 12" in find(browser, "#charts").text
    pick(browser, "#sample", "2")
    assert not browser.find_elements("css selector", "canvas[tabindex]")
    titles = [h.text for h in browser.find_elements("css selector", ".chart h3")]
    assert not [t for t in titles if "Ω" in t or "TVR" in t] and [t for t in titles if "logit lens" in t]
    assert len(current(browser)) == 2


def test_what_differs_between_runs(opened, tmp_path):
    """Grids, lengths, thinned maps, and no maps at all."""
    grids = [made.picture("image 1", 0, 3, 4), made.picture("image 1", 0, 6, 6)]
    first, second = (made.text(made.words(n), (p,)) for n, p in zip((20, 100), grids))
    traces = [made.trace(first, 0), dataclasses.replace(made.trace(second, 1), maps=None), made.trace(second, 2)]
    of = [made.run(name, [trace]) for name, trace in zip("abc", traces)]
    browser = opened(of, budget=31_000)
    every = data_of((tmp_path / "index.html").read_text())["samples"][0]["runs"][2]["every"]
    assert every > 1
    sizes = "return [...document.querySelectorAll('.run')].map((run) => run.querySelector('canvas').width)"
    assert browser.execute_script(sizes) == [160, 240, 240]
    assert len(browser.find_elements("css selector", ".run .source")) == 2
    hover(browser, f"#token2-{every + 1}")
    assert find(browser, ".run:nth-child(3) .whose").text == f"The map is that of token {every + 1}."
    where = find(browser, ".run:nth-child(3) canvas").get_attribute("aria-label")
    row, column = divmod(every, 6)
    assert f"token {every + 1}: " in where and f"most in row {row + 1}, column {column + 1}" in where
    hover(browser, ".chart svg", 210, 0)
    assert int(current(browser)[2]) > 60 and current(browser)[0] == "19", "the pointer reaches the longest answer"


def test_without_pvm_its_panels_are_absent(opened):
    browser = opened(runs()[:1])
    titles = [h.text for h in browser.find_elements("css selector", ".chart h3")]
    assert len(titles) == 3 and not [t for t in titles if "PVM" in t]
    assert "self-attention" in find(browser, ".source").text and current(browser) == ["0"]
    assert [o.text for o in browser.find_elements("css selector", "#paint option")][1:] == ["none"]


def test_models_of_different_depth(opened):
    """A layer that one of them lacks is drawn of the others alone."""
    deep = made.trace(made.text(made.words(40), (made.picture("image 1", 0, 3, 4),)), 0)
    lens = {f.name: getattr(deep.lens, f.name) for f in dataclasses.fields(deep.lens)}
    cut = {name: value[:2] if value.ndim > 1 else np.minimum(value, 1) for name, value in lens.items()}
    flat = {"visual_mass": deep.dilution.visual_mass[:2], "tvr": deep.dilution.tvr[:2], "fits": deep.dilution.fits[:2]}
    shallow = dataclasses.replace(
        deep,
        dilution=dataclasses.replace(deep.dilution, **flat),
        lens=dataclasses.replace(deep.lens, **cut),
        maps=dataclasses.replace(deep.maps, attention=deep.maps.attention[:2]),
    )
    browser = opened([made.run("shallow", [shallow]), made.run("deep", [deep])])
    pick(browser, "#layer", "4")
    for chart in browser.find_elements("css selector", ".chart")[:2]:
        assert find(chart, "h3").text.endswith(", layer 3")
        assert len(chart.find_elements("css selector", ".series")) == 1
    (first, second) = [why.text for why in browser.find_elements("css selector", ".chart .why")[:2]]
    assert first == "shallow, has no such layer" and second.startswith("deep, Ω_V ∝ t^")
    pick(browser, "#layer", "1")
    assert len(browser.find_elements("css selector", ".chart:first-child .series")) == 2
    assert browser.get_log("browser") == []


def test_numbers_have_three_digits(opened):
    browser = opened(runs()[:1])
    said = [browser.execute_script("return digits(arguments[0])", x) for x in (0.12345, 0.000104, 1e-4, 123456, 0)]
    assert said == ["0.123", "1.04e-4", "1e-4", "1.23e+5", "0"]


def test_an_axis_has_labels_however_narrow_it_is(opened):
    browser = opened(runs()[:1])
    ticks = "return axis(...arguments, 0, 1).ticks"
    assert browser.execute_script(ticks, 210, 480, True) == [300, 400]
    assert browser.execute_script(ticks, 30, 480, True) == [50, 100, 200]
    assert browser.execute_script(ticks, 1, 1000, True) == [1, 10, 100, 1000]
    assert browser.execute_script(ticks, 210, 480, False) == [300, 400]


def test_the_lens_says_what_each_layer_predicts(opened):
    browser = opened(runs())
    press(browser, "\ue014")  # the right arrow
    rows = [row.text for row in browser.find_elements("css selector", ".layers tbody tr")][:4]
    assert rows[0].startswith('3 " word1" 0.95 1 0') and rows[3].startswith('0 " word8"')
    before = browser.execute_script("return document.querySelector('.lens canvas').toDataURL()")
    pick(browser, "#lens", "kl")
    assert browser.execute_script("return document.querySelector('.lens canvas').toDataURL()") != before


def test_hostile_text_stays_text(opened):
    hostile = runs()
    browser = opened([made.run(made.SECRETS, hostile[0].traces), hostile[1]])
    assert made.SECRETS in find(browser, ".text").text and made.SECRETS in find(browser, "#summary").text
    assert browser.execute_script("return window.stolen ?? null") is None
    assert len(browser.find_elements("css selector", "script")) == 2


CONTRAST = """
const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
const pen = canvas.getContext('2d', {willReadFrequently: true});
const flat = (colors) => {
  pen.clearRect(0, 0, 1, 1);
  for (const c of colors) { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); }
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  const found = [];
  for (let n = node; n; n = n.parentElement) found.unshift(getComputedStyle(n).backgroundColor);
  return found;
};
const contrast = (node) => {
  const below = behind(node);
  const style = getComputedStyle(node);
  const ink = node instanceof SVGElement ? style.fill : style.color;
  const [a, b] = [light(flat([...below, ink])), light(flat(below))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const nodes = document.querySelectorAll(
  'h1, h2, h3, p, th, td, label, kbd, .token, .numbers dt, .chart svg text, .chart .now b, .note, figcaption, summary');
return [...nodes].filter((n) => n.checkVisibility() && n.textContent.trim())
  .map((n) => [contrast(n), n.nodeName + '.' + n.getAttribute('class') + ': ' + n.textContent.slice(0, 20)])
  .sort((a, b) => a[0] - b[0]).slice(0, 3);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_fits(opened, scheme, tmp_path):
    browser = opened(runs())
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {
            "features": [
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ]
        },
    )
    worst = browser.execute_script(CONTRAST)
    assert worst[0][0] >= 4.5, worst
    for width in (1280, 420):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        file = Path(tmp_path / f"{scheme}{width}.png")
        assert browser.save_screenshot(str(file))
        with Image.open(file) as shot:
            brightness = np.asarray(shot.convert("L")).mean()
        assert (brightness > 180) if scheme == "light" else (brightness < 90)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
