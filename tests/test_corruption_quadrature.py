"""Quadrature rules over mask ratios: nodes, weights, and what they integrate exactly."""

import pytest

from tests.objective_inputs import NOISE, ROLLOUTS
from tests.oracles import GAUSS_LEGENDRE, SIMPSON
from unmask.corruption import draw_quadrature, quadrature_rule
from unmask.errors import ConfigError


@pytest.mark.parametrize("num_nodes", [1, 2, 3])
def test_gauss_legendre_nodes_are_those_of_the_tables(num_nodes):
    nodes, weights = quadrature_rule("gauss_legendre", num_nodes)
    found = sorted(zip(nodes.tolist(), weights.tolist(), strict=True))
    assert [x for pair in found for x in pair] == pytest.approx(
        [x for pair in GAUSS_LEGENDRE[num_nodes] for x in pair], abs=1e-15
    )


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5, 8])
def test_gauss_legendre_is_exact_up_to_degree_2n_minus_1_and_no_further(num_nodes):
    nodes, weights = quadrature_rule("gauss_legendre", num_nodes)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-14)
    for degree in range(2 * num_nodes):
        assert (weights * nodes**degree).sum().item() == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert abs((weights * nodes ** (2 * num_nodes)).sum().item() - 1 / (2 * num_nodes + 1)) > 1e-10


def test_simpson_has_its_nodes_and_weights():
    nodes, weights = quadrature_rule("simpson", 3)
    assert list(zip(nodes.tolist(), weights.tolist(), strict=True)) == SIMPSON


@pytest.mark.parametrize(
    ("rule", "num_nodes", "message"),
    [
        ("gauss_legendre", 0, "num_nodes = 0: at least one is needed. Try 3"),
        ("simpson", 0, "num_nodes = 0: Simpson's rule has 3 nodes. Use 3"),
        ("simpson", 2, "num_nodes = 2: Simpson's rule has 3 nodes. Use 3"),
        ("simpson", 4, "num_nodes = 4: Simpson's rule has 3 nodes. Use 3"),
        ("trapezoid", 3, "quadrature = 'trapezoid': unknown. Use one of: gauss_legendre, simpson"),
    ],
)
def test_rules_refuse_nodes_they_do_not_have(rule, num_nodes, message):
    with pytest.raises(ConfigError, match=message):
        quadrature_rule(rule, num_nodes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"masking": "none"}, "masking = 'none'"), ({"num_masks_per_node": 0}, "num_masks = 0")],
)
def test_draws_refuse_what_they_do_not_know(fields, message):
    settings = {"rule": "gauss_legendre", "num_nodes": 2, "num_masks_per_node": 1, "masking": "bernoulli"} | fields
    with pytest.raises(ConfigError, match=message):
        draw_quadrature(ROLLOUTS, **settings, count_positions="all", noise=NOISE)
