"""Sites: one spelling, both ways, and a sentence for everything that is none."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mech_absa.errors import SiteError
from mech_absa.sites import (
    HEAD_KINDS,
    KINDS,
    ROLE_GROUPS,
    ROLES,
    Site,
    parse_layers,
    role_indices,
    vocabulary,
)

ATS = st.one_of(st.none(), st.sampled_from([*ROLES, *ROLE_GROUPS]), st.integers(-999, 999))


@st.composite
def sites(draw) -> Site:
    kind = draw(st.sampled_from(KINDS))
    return Site(
        draw(st.integers(0, 200)),
        kind,
        draw(st.integers(0, 200)) if kind in HEAD_KINDS else None,
        draw(ATS),
    )


@given(sites())
def test_round_trip(site):
    assert Site.parse(str(site)) == site
    assert Site.parse(f"  {site}\n") == site
    assert hash(Site.parse(str(site))) == hash(site)
    assert re.fullmatch(r"\S+", str(site)), "a site is one word: it stands in tables and file names"


@given(sites(), sites())
def test_two_sites_never_share_a_spelling(one, two):
    assert (str(one) == str(two)) == (one == two)


@pytest.mark.parametrize(
    ("text", "site", "hook"),
    [
        ("L5.resid_post", Site(5, "resid_post"), "blocks.5.hook_resid_post"),
        ("L5.attn_out", Site(5, "attn_out"), "blocks.5.hook_attn_out"),
        ("L0.head3", Site(0, "head", 3), "blocks.0.attn.hook_z"),
        ("L11.k0", Site(11, "k", 0), "blocks.11.attn.hook_k"),
        (
            "L5.attn_out@query.last",
            Site(5, "attn_out", None, "query.last"),
            "blocks.5.hook_attn_out",
        ),
        ("L5.resid_mid@-1", Site(5, "resid_mid", None, -1), "blocks.5.hook_resid_mid"),
        ("L5.resid_pre@007", Site(5, "resid_pre", None, 7), "blocks.5.hook_resid_pre"),
        ("L5.head12@aspect", Site(5, "head", 12, "aspect"), "blocks.5.attn.hook_z"),
    ],
)
def test_by_hand(text, site, hook):
    assert Site.parse(text) == site
    assert site.hook_name == hook


@pytest.mark.parametrize(
    "text",
    [
        "",
        "L.resid_post",
        "5.resid_post",
        "L5",
        "L5.",
        "L5.resid_post@",
        "L5.Resid_post",
        "L-1.resid_post",
        "L5.resid_post.x",
        "L5 .mlp_out",
        "l5.mlp_out",
        "L²^.mlp_out",
        f"L{'9' * 50}.mlp_out",
    ],
)
def test_what_is_no_site(text):
    with pytest.raises(
        SiteError, match=re.escape(f"{text!r} is no site; sites look like L5.resid_post")
    ):
        Site.parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("L5.resid", "unknown kind of site 'resid' in layer 5; accepted: resid_pre, resid_mid"),
        ("L5.head", "site L5.head needs a head, as in L5.head3"),
        ("L5.mlp_out3", "site L5.mlp_out has no heads"),
        ("L5.mlp_out@verb", "unknown role 'verb' in site L5.mlp_out; accepted: template, before"),
        ("L5.mlp_out@aspect.second", "unknown role 'aspect.second'"),
    ],
)
def test_what_a_site_may_not_say(text, sentence):
    with pytest.raises(SiteError, match=re.escape(sentence)):
        Site.parse(text)


def test_a_model_has_its_sites_and_no_others():
    shape = {"n_layers": 12, "n_heads": 8, "n_kv_heads": 2, "model": "toy"}
    for text in ("L0.resid_pre", "L11.resid_post", "L11.head7", "L3.q7", "L3.k1", "L3.v1"):
        assert Site.parse(text).check(**shape) == Site.parse(text)
    for text, sentence in {
        "L99.resid_post": "site L99.resid_post does not exist: toy has 12 layers, L0 to L11",
        "L12.resid_post@answer": "site L12.resid_post@answer does not exist: toy has 12 layers, L0 to L11",
        "L3.head8": "site L3.head8 does not exist: toy has 8 such heads a layer, 0 to 7",
        "L3.k2": "site L3.k2 does not exist: toy has 2 such heads a layer, 0 to 1",
    }.items():
        with pytest.raises(SiteError, match=re.escape(sentence) + "$"):
            Site.parse(text).check(**shape)
    with pytest.raises(
        SiteError, match=r"site L3.resid_mid does not exist in toy; it has resid_pre or resid_post$"
    ):
        Site.parse("L3.resid_mid").check(**shape, kinds=("resid_pre", "resid_post"))


def test_order_and_everywhere():
    """Sites sort by layer first: tables list them in depth."""
    assert sorted([Site(10, "attn_out"), Site(2, "resid_post")])[0].layer == 2
    assert Site.parse("L5.head3@query.last").everywhere == Site(5, "head", 3)


def test_role_indices():
    assert [ROLES[i] for i in role_indices("query")] == [
        "query.first",
        "query.middle",
        "query.last",
    ]
    assert [ROLES[i] for i in role_indices("opinion")] == ["opinion"]
    assert role_indices("all") == tuple(range(len(ROLES)))
    own = vocabulary(["subject"])
    assert role_indices("all", own) == tuple(range(len(own)))
    assert role_indices("subject", own) == tuple(range(len(ROLES), len(own)))
    assert role_indices("subject", ROLES) == ()
    assert len(set(ROLES)) == len(ROLES) and not set(ROLES) & set(ROLE_GROUPS)


@pytest.mark.parametrize(
    ("text", "n", "layers"),
    [
        ("3", 4, [3]), ("2-5", 12, [2, 3, 4, 5]), ("0,2-4", 12, [0, 2, 3, 4]), ("4-4", 12, [4]),
        ("5,1,5, 1-2", 12, [1, 2, 5]), ("all", 3, [0, 1, 2]),
        ("first", 12, [0, 1, 2, 3]), ("middle", 12, [4, 5, 6, 7]), ("last", 12, [8, 9, 10, 11]), ("middle", 32, list(range(10, 21))),
        ("first", 1, [0]), ("last", 1, [0]),
    ],
)  # fmt: skip
def test_layers(text, n, layers):
    assert parse_layers(text, n) == tuple(layers)


@given(st.integers(1, 120))
def test_thirds_have_one_size_and_lie_inside(n):
    first, middle, last = (parse_layers(name, n) for name in ("first", "middle", "last"))
    assert len(first) == len(middle) == len(last) >= 1
    assert first[0] == 0 and last[-1] == n - 1
    assert abs((middle[0] - 0) - (n - 1 - middle[-1])) <= 1, "the middle is in the middle"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=6))
def test_layers_are_the_union_of_the_ranges(ranges):
    text = ",".join(f"{a}-{a + d}" if d else f"{a}" for a, d in ranges)
    assert parse_layers(text, 100) == tuple(
        sorted({i for a, d in ranges for i in range(a, a + d + 1)})
    )


@pytest.mark.parametrize(
    "text", ["", "a", "5-2", "1-", "-1", "1,,2", "1.5", "0-3-5", "0-9999999999", "²", "٣"]
)
def test_what_names_no_layers(text):
    with pytest.raises(
        SiteError,
        match=re.escape(
            f"{text!r} names no layers; accepted: 3, 2-5, 0,2-4, all, first, middle or last"
        ),
    ):
        parse_layers(text, 12)


@pytest.mark.parametrize(
    ("text", "layer"), [("12", 12), ("0,4-99", 99), ("0-999999999", 999_999_999)]
)
def test_layers_beyond_the_model(text, layer):
    with pytest.raises(
        SiteError, match=f"layer {layer} was asked for; the model has 12 layers, 0 to 11"
    ):
        parse_layers(text, 12)
