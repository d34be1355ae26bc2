from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from tests.report import pages
from tests.report.pages import HOSTILE, Page

from kronsae.eval.display import visible
from kronsae.report import render, report_data, write
from kronsae.report.html import lines_of, peak_tokens, share

TAGS = """
    html head meta title style body header main nav section article h1 h2 h3 h5 p a b i span code pre mark strong
    dl dt dd div ul ol li table thead tbody tr th td details summary figure figcaption output script
    svg clippath rect g line text path circle
"""


@pytest.fixture(scope="module")
def page_text() -> str:
    return pages.whole_page()


@pytest.fixture(scope="module")
def page(page_text: str) -> Page:
    return Page(page_text)


def hostile_page() -> str:
    """Hostile text wherever a person or a model may put text."""
    rows, given, names = [], {}, []
    for number, name in enumerate(HOSTILE):
        rows.append(pages.row(name, "dense-topk" if number % 2 else "kronecker-topk"))
        given[name] = pages.latents((2, 4) if number % 2 == 0 else None)
        names.append(name)
    rows[0]["language_model"] = {"kind": "skipped", "reason": HOSTILE[0]}
    rows[0]["ce_recovered"] = None
    run = {
        "kronsae_version": HOSTILE[1],
        "config": {"model": {"name": HOSTILE[0]}, "hook": HOSTILE[1], "text": {"source": HOSTILE[2]}, HOSTILE[4]: 1},
    }
    data = report_data(run=run, rows=rows, metrics=pages.metrics(names), latents=given, title=HOSTILE[0] + HOSTILE[2])
    return render(data)


@pytest.mark.parametrize("make", [pages.whole_page, hostile_page])
def test_nothing_but_our_own_runs_or_is_fetched(make: object) -> None:
    assert callable(make)
    text = make()
    page = Page(text)
    programs = [found for found in page.all("script") if found.attributes.get("type") != "application/json"]
    assert len(programs) == 1
    digest = base64.b64encode(hashlib.sha256(programs[0].text.encode()).digest()).decode()
    (policy,) = (found for found in page.all("meta") if "http-equiv" in found.attributes)
    assert policy.attributes["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert {found.tag for found in page.elements} <= set(TAGS.split())
    for found in page.elements:
        for name, value in found.attributes.items():
            assert not name.startswith("on"), found
            assert name not in ("src", "srcset", "srcdoc", "action", "formaction", "background", "xlink:href"), found
            if name == "href":
                assert (value or "").startswith("#"), found
            if name == "style":
                assert re.fullmatch(r"(--[vbe]:[\d.e-]+;?)*", value or ""), found
    assert "url(http" not in text
    assert "@import" not in text


def test_hostile_text_is_shown_as_it_is() -> None:
    text = hostile_page()
    page = Page(text)
    for given in HOSTILE:
        shown = visible(given)
        names = [found for found in page.all("th") if found.attributes.get("scope") == "row" and shown in found.text]
        assert names, given
        assert any(shown.strip() in found.text for found in [*page.all("mark"), *page.all("span")]), given
    assert "49" not in page.all("title")[0].text
    assert page.all("title")[0].text == HOSTILE[0] + HOSTILE[2]
    assert not set(text) & {"\x00", "\x1b", "\u202e", "\u2066", "\u2028"}
    text.encode()


def test_json_islands_survive_hostile_names() -> None:
    page = Page(hostile_page())
    assert len(page.islands()) == 5
    for island in page.islands():
        assert [series["name"] for series in island["series"]] == [visible(name) for name in HOSTILE]


def test_every_link_has_its_target(page: Page) -> None:
    ids = [found.attributes["id"] for found in page.elements if "id" in found.attributes]
    assert len(ids) == len(set(ids))
    for found in page.elements:
        for name in ("href", "data-base", "data-extension"):
            if name in found.attributes:
                assert (found.attributes[name] or "").removeprefix("#") in ids
        if found.tag == "g" and "clip-path" in found.attributes:
            assert (found.attributes["clip-path"] or "")[5:-1] in ids


def test_a_head_is_a_grid_of_bases_and_extensions(page: Page) -> None:
    grids = page.all("table", "grid")
    assert len(grids) == 2
    cells = [found for found in page.all("a") if "data-base" in found.attributes and grids[0] in found.ancestors]
    assert len(cells) == 2 * 4
    targets = [(found.attributes["data-base"], found.attributes["data-extension"]) for found in cells]
    assert targets == [(f"s1-h0-b{i}", f"s1-h0-e{j}") for i in range(2) for j in range(4)]
    assert sum("data-first" in found.attributes for found in cells) == 1
    titles = [found.text for found in page.all("h5")]
    assert "Base 1" in titles
    assert "Extension 3" in titles
    assert "Latent 6 = base 1 AND extension 2" in titles
    assert "Never active on the evaluated text." in page.text


def test_a_head_with_null_symbols_has_a_row_and_a_column_for_what_is_alone() -> None:
    given = pages.latents((2, 3), heads=0)
    shown = pages.head_with_null_symbols(0, (2, 3))
    given["gallery"] |= {"heads": [shown], "latents": [shown["cells"][3], shown["cells"][10]]}
    page = Page(pages.whole_page(latents={"kron": given}))
    (grid,) = page.all("table", "grid")
    links = [found for found in page.all("a") if grid in found.ancestors and found.ancestors[-1].tag == "td"]
    assert [found.attributes["href"] for found in links] == [f"#s1-h0-c{cell}" for cell in range(11)]
    bases = [f"s1-h0-b{i}" for i in (0, 1) for _ in range(4)] + [None] * 3
    extensions = [None if j == 3 else f"s1-h0-e{j}" for _ in range(3) for j in range(4)][:-1]
    assert [found.attributes.get("data-base") for found in links] == bases
    assert [found.attributes.get("data-extension") for found in links] == extensions
    titles = [found.text for found in page.all("h5")]
    assert titles[-11:] == [
        *(f"Latent {4 * i + j} = base {i} AND extension {j}" if j < 3 else f"Latent {4 * i + j} = base {i} alone"
          for i in range(2) for j in range(4)),
        *(f"Latent {8 + j} = extension {j} alone" for j in range(3)),
    ]  # fmt: skip
    assert "Head 0: base 0 alone." in page.text
    assert "Head 0: extension 2 alone." in page.text


def test_essentials_need_no_script(page_text: str, page: Page) -> None:
    """Curves, contexts and every cell of a head are in the page itself; only a script's class hides any of it."""
    assert len(page.all("svg")) == 5
    assert len(page.all("path", "curve")) == 5 * 2
    assert len(page.all("article", "panel")) == 2 * (2 + 4 + 8)
    css = page.all("style")[0].text
    hidden = [line for line in css.splitlines() if "display: none" in line and "summary" not in line]
    assert all(line.startswith(".js ") or "::" in line for line in hidden), hidden
    assert 'class="js"' not in page_text


def test_keyboard_and_screen_reader(page: Page) -> None:
    for found in page.all("svg"):
        assert found.attributes["role"] == "img"
        assert "ends at" in (found.attributes["aria-label"] or "") or "at most" in (
            found.attributes["aria-label"] or ""
        )
    assert all(found.attributes.get("tabindex") == "0" for found in page.all("div", "plot"))
    assert all(found.attributes.get("scope") for found in page.all("th"))
    assert page.all("html")[0].attributes["lang"] == "en"


def test_tokens_are_shaded_by_their_activation() -> None:
    shown = pages.latent(0, (1, 1))
    (line, *_), _ = lines_of(shown)
    assert line.peak.text == " def"
    assert line.peak.style == "--v:1;--b:1;--e:1"
    assert line.peak.title == "1.5 (base 3, extension 0.75)"
    assert [span.text for span in line.before] == [" the", "↵"]
    assert line.before[0].style == ""
    assert line.before[1].style == "--v:0.33;--b:0.33;--e:0.33"


def test_a_latent_that_lost_against_others_says_so() -> None:
    shown = pages.latent(0, (1, 1))
    shown["top"][0]["values"][1] = 0.0
    (line, *_), _ = lines_of(shown)
    assert line.before[1].style == "--b:0.33;--e:0.33"
    assert line.before[1].title == "0: not kept by the sparsifier (base 1, extension 0.25)"


def test_inactive_tokens_are_joined_and_indentation_is_short() -> None:
    context = {
        "tokens": ["a", "b", "x", "        ", "c"],
        "peak": 2,
        "values": [0.0, 0.0, 1.0, 0.0, 0.0],
        "base": [],
        "extension": [],
    }
    (line,), sampled = lines_of({"top": [context], "max_activation": 2.0})
    assert [span.text for span in line.before] == ["ab"]
    assert [span.text for span in line.after] == ["␣₈c"]
    assert line.peak.style == "--v:0.5"
    assert line.peak.title == "1"
    assert sampled == []


def test_a_latent_is_named_by_its_peaks() -> None:
    contexts = [{"tokens": [token], "peak": 0} for token in (" the", "the", " ", "↵", "x", "y")]
    assert peak_tokens(contexts) == ["the", "␣", "↵"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "50%"), (0.034, "3.4%"), (0.0012, "0.12%"), (0.00001, "<0.01%"), (0.0, "0%"), (1.0, "100%")],
)
def test_shares(value: float, text: str) -> None:
    assert share(value) == text


def test_a_run_with_little_to_show_has_a_page_all_the_same() -> None:
    bare = Page(render(report_data(run={}, rows=[{"name": "only"}])))
    assert not bare.all("svg")
    assert "Sparse autoencoders on ? of ?" in bare.text
    assert [found.text for found in bare.all("td")] == ["–"] * 13
    empty = pages.latents()
    empty["gallery"]["latents"] = []
    empty["statistics"]["active_tokens"] = [0] * 8
    page = Page(pages.whole_page(latents={"topk": empty}))
    assert "None of 8 latents was active on 40,000 tokens." in page.text


def test_the_page_is_bounded() -> None:
    """The most that the defaults of `GalleryConfig` let through: 256 cells, 4 contexts of 31 tokens each."""
    given = pages.latents((16, 16), heads=1, contexts=4)
    tokens = [" token"] * 31
    for shown in [*given["gallery"]["heads"][0]["cells"], *given["gallery"]["latents"] * 8]:
        shown["top"] = [pages.context(tokens, parents=True)] * 4
    given["gallery"]["latents"] *= 8
    size = len(pages.whole_page(latents={"topk": pages.latents(), "kron": given}).encode())
    assert size < 5_000_000


def test_write(tmp_path: Path) -> None:
    data = report_data(run=pages.RUN, rows=pages.rows())
    path = write(data, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == render(data)
    assert json.dumps(pages.RUN["config"])[:20] not in render(data)  # the config is indented, and escaped
    assert "&#34;hook&#34;: &#34;layers.3&#34;" in render(data)
