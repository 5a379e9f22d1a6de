"""The training domain: what is inside, outside, far outside, and what is said."""

import math

import numpy as np
import pytest

from airpi_py4d import Acquisition, optics
from airpi_py4d.domain import ElectronCheck, check_acquisition, coverage
from airpi_py4d.model import Contract, Model

K0 = optics.aperture_radius(300e3, 20.0)
DOMAIN = {
    "energy": (6e4, 2e5),
    "semiangle": (25.0, 33.0),
    "relative_scan_step": (0.3, 0.8),
    "electrons_per_pattern": (2.0, 1e7),
    "defocus_phase": (-2.0, 2.0),
    "spherical_phase": (0.0, 1.0),
    "coverage": (1.1, 3.0),
}
SHAPE = (64, 48)


def contract(*names):
    return Contract("example", "1", 64, 12.0, 16, {name: DOMAIN[name] for name in names})


def acquisition(**options):
    """Inside DOMAIN but for what is given: 100 keV, 28 mrad, 0.5 lambda / alpha, reaching to 2 radii."""
    energy, semiangle = options.get("energy", 100e3), options.get("semiangle", 28.0)
    k0 = optics.aperture_radius(energy, semiangle)
    return Acquisition(
        **{
            "energy": energy,
            "semiangle": semiangle,
            "scan_step": 0.5 / k0,
            "k_pixel": (k0 / 12, k0 / 12),
            "center": (31.5, 23.5),
            **options,
        }
    )


def defocus(phase, **options):
    """Defocus [A] that gives a phase at the aperture's edge."""
    some = acquisition(**options)
    return -phase / (math.pi * optics.wavelength(some.energy) * some.aperture_radius**2)


def step(relative):
    return relative / acquisition().aperture_radius


def radius(pixels):
    return {"k_pixel": (acquisition().aperture_radius / pixels,) * 2}


class TestCoverage:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"rotation": 30.0},
            {"transpose": True},
            {"k_pixel": (0.05, 0.08), "rotation": -100.0},
            {"ellipse": (1.2, 1.0, 25.0)},
            {"ellipse": (1.0, 1.3, -70.0), "k_pixel": (0.05, 0.04), "transpose": True, "rotation": 12.0},
            {"center": (20.2, 30.7)},
        ],
    )
    def test_largest_circle_on_the_detector(self, options):
        """Against a circle drawn on the detector with the definition of `Acquisition`."""
        some = acquisition(**options)
        angle = np.linspace(0, 2 * np.pi, 20001) + 1e-6  # along no axis
        vector = np.stack([np.cos(angle), np.sin(angle)])  # k along scan rows and columns
        turn = np.deg2rad(some.rotation)
        back = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) @ vector
        if some.transpose:
            back = back[::-1]
        back = back / np.array(some.k_pixel)[:, None]
        if some.ellipse is not None:
            a, b, theta = some.ellipse
            u = np.array([np.cos(np.deg2rad(theta)), np.sin(np.deg2rad(theta))])
            v = np.array([-u[1], u[0]])
            back = np.outer(u, u @ back) + np.outer(v, v @ back) * b / a
        row, column = some.center
        room = [np.where(back[0] > 0, 63.5 - row, row + 0.5), np.where(back[1] > 0, 47.5 - column, column + 0.5)]
        reach = np.minimum(room[0] / abs(back[0]), room[1] / abs(back[1])).min()
        assert coverage(SHAPE, some) == pytest.approx(reach / some.aperture_radius, rel=1e-4)

    def test_descan(self):
        descan = np.zeros((3, 4, 2))
        descan[1, 2] = (0, 6)
        assert coverage(SHAPE, acquisition(descan=descan)) == pytest.approx((24 - 6) / 12)
        descan[2, 2] = (-26, 0)
        assert coverage(SHAPE, acquisition(descan=descan)) == pytest.approx((32 - 26) / 12)

    def test_axis_beside_the_detector(self):
        assert coverage(SHAPE, acquisition(center=(-1.5, 23.5))) < 0

    def test_center_is_needed(self):
        with pytest.raises(ValueError, match="center is None"):
            coverage(SHAPE, acquisition(center=None))


class TestAcquisition:
    def test_inside(self):
        assert check_acquisition(contract(*DOMAIN), SHAPE, acquisition()) == []

    @pytest.mark.parametrize("name", ["energy", "semiangle", "relative_scan_step", "defocus_phase"])
    @pytest.mark.parametrize("end", [0, 1])
    def test_bounds_are_inside(self, name, end):
        bound = DOMAIN[name][end]
        options = {
            "energy": {"energy": bound},
            "semiangle": {"semiangle": bound},
            "relative_scan_step": {"scan_step": step(bound)},
            "defocus_phase": {"defocus": defocus(bound)},
        }[name]
        assert check_acquisition(contract(name), SHAPE, acquisition(**options)) == []

    @pytest.mark.parametrize(
        ("name", "options", "message", "expect"),
        [
            ("energy", {"energy": 3e5}, r"energy is 3e\+05 eV, outside of 6e\+04 to 2e\+05 eV", "weak objects to fade"),
            ("energy", {"energy": 4e4}, r"energy is 4e\+04 eV, outside of", "fold where the phase passes pi"),
            (
                "semiangle",
                {"semiangle": 20},
                "semiangle is 20 mrad, outside of 25 to 33 mrad",
                "merged and false atoms",
            ),
            ("semiangle", {"semiangle": 40}, "semiangle is 40 mrad, outside of 25 to 33 mrad", "depth of focus"),
            (
                "relative_scan_step",
                {"scan_step": step(1.0)},
                r"scan_step is 1\.\d* A, 1 lambda / alpha, outside of 0.3 to 0.8 lambda / alpha",
                "gaps and false atoms .*Friedrich et al. 2023",
            ),
            (
                "relative_scan_step",
                {"scan_step": step(0.1)},
                r"scan_step is 0\.\d* A, 0.1 lambda / alpha, outside of",
                "stride=2",
            ),
            (
                "defocus_phase",
                {"defocus": defocus(4.0)},
                r"defocus is -\d.* A, at the aperture's edge 4 rad, outside of -2 to 2 rad",
                "rings and false atoms",
            ),
            ("defocus_phase", {"defocus": defocus(-5.0)}, r"defocus is \d.* A, at .* -5 rad, outside", "false atoms"),
            (
                "spherical_phase",
                {"spherical_aberration": 5e4},
                r"spherical_aberration is 5e\+04 A, at the aperture's edge .* rad, outside of 0 to 1 rad",
                "rings and false atoms",
            ),
            ("coverage", radius(23), r"The detector reaches .* to 1\.043 radii, outside of 1.1 to 3 radii", "cuts the"),
            ("coverage", radius(6), r"The detector reaches .* to 4 radii, outside of 1.1 to 3 radii", "its rim"),
        ],
    )
    def test_outside(self, name, options, message, expect):
        pattern = f"^{message}.*, the range that model example was trained on. .*{expect}"
        with pytest.warns(UserWarning, match=pattern) as caught:
            messages = check_acquisition(contract(name), SHAPE, acquisition(**options))
        assert [str(each.message) for each in caught] == messages
        assert len(messages) == 1
        assert caught[0].filename == __file__

    @pytest.mark.parametrize(
        ("name", "outside", "far"),
        [
            ("energy", {"energy": 3.9e5}, {"energy": 4.1e5}),
            ("energy", {"energy": 3.1e4}, {"energy": 2.9e4}),
            ("semiangle", {"semiangle": 65}, {"semiangle": 67}),
            ("semiangle", {"semiangle": 12.6}, {"semiangle": 12.4}),
            ("relative_scan_step", {"scan_step": step(1.59)}, {"scan_step": step(1.61)}),
            ("relative_scan_step", {"scan_step": step(0.076)}, {"scan_step": step(0.074)}),
            ("defocus_phase", {"defocus": defocus(5.1)}, {"defocus": defocus(5.2)}),
            ("defocus_phase", {"defocus": defocus(-5.1)}, {"defocus": defocus(-5.2)}),
            ("coverage", radius(24 / 0.89), radius(24 / 0.87)),
        ],
    )
    def test_far_outside(self, name, outside, far):
        with pytest.warns(UserWarning, match=", outside of"):
            check_acquisition(contract(name), SHAPE, acquisition(**outside))
        with pytest.raises(ValueError, match=r", far outside of .* strict=False reconstructs all the same\.$"):
            check_acquisition(contract(name), SHAPE, acquisition(**far))
        with pytest.warns(UserWarning, match=", far outside of") as caught:
            messages = check_acquisition(contract(name), SHAPE, acquisition(**far), strict=False)
        assert [str(each.message) for each in caught] == messages
        assert "strict" not in messages[0]

    def test_several(self):
        some = acquisition(energy=3e5, semiangle=70, argument_names={"semiangle": "semiangle_cutoff"})
        with pytest.raises(ValueError, match=r"^semiangle_cutoff is 70 mrad, far outside"):
            check_acquisition(contract("energy", "semiangle"), SHAPE, some)
        with pytest.warns(UserWarning, match="outside") as caught:
            messages = check_acquisition(contract("energy", "semiangle"), SHAPE, some, strict=False)
        assert [message.split()[0] for message in messages] == ["energy", "semiangle_cutoff"]
        assert len(caught) == 2

    def test_nothing_said_of_the_domain(self):
        """No model can do without the disk."""
        far = acquisition(energy=3e5, semiangle=5, defocus=1e4)
        assert check_acquisition(contract(), SHAPE, far) == []
        with pytest.warns(UserWarning, match=r"to 1\.043 radii, outside of 1\.05 radii and more\. The detector cuts"):
            check_acquisition(contract(), SHAPE, acquisition(**radius(23)))

    def test_oblong_steps(self):
        """Kernels skip positions along the short step: 0.1 x 0.3 is seen as 0.3 x 0.3."""
        assert (
            check_acquisition(contract("relative_scan_step"), SHAPE, acquisition(scan_step=(step(0.11), step(0.3))))
            == []
        )
        with pytest.warns(UserWarning, match=r"scan_step is \(.*\) A, in the kernels up to 1 lambda / alpha, outside"):
            check_acquisition(contract("relative_scan_step"), SHAPE, acquisition(scan_step=(step(0.5), step(1.0))))

    def test_shipped_model(self):
        shipped = Model(device="cpu").contract
        some = Acquisition(300e3, 20.0, 0.2, (K0 / 12, K0 / 12), center=(32, 32))
        assert check_acquisition(shipped, (64, 64), some) == []


class TestElectrons:
    def check(self, electrons, missing=None, **options):
        check = ElectronCheck(contract("electrons_per_pattern"), electrons.shape, **options)
        for row, values in enumerate(electrons):
            for first in (0, 2):
                part = slice(first, first + 2 if first == 0 else None)
                check.add(values[part], None if missing is None else missing[row, part])
        return check

    def test_median_of_what_was_measured(self):
        electrons = np.random.default_rng(0).poisson(30, (8, 5)).astype(np.float32)
        missing = np.random.default_rng(1).random((8, 5)) < 0.3
        electrons[missing] = 1e9
        check = self.check(electrons, missing)
        assert check.median == np.median(electrons[~missing])
        assert check.finish() == []

    def test_summed(self):
        assert self.check(np.full((4, 4), 3.0), summed=9).median == 27

    def test_bright_positions_do_not_hide_empty_ones(self):
        electrons = np.full((8, 5), 1.5)
        electrons[::4] = 1000
        assert electrons.mean() > 200
        with pytest.warns(UserWarning, match=r"^The electrons per pattern are 1.5, outside of 2 to 1e\+07, the range"):
            self.check(electrons).finish()

    @pytest.mark.parametrize(
        ("outside", "far", "expect"),
        [(1.1, 0.9, "a phase that is too small.*sum_neighbours=3.*gain"), (9e7, 1.1e8, "give gain")],
    )
    def test_outside(self, outside, far, expect):
        check = self.check(np.full((8, 5), outside))
        with pytest.warns(UserWarning, match=f", outside of .*{expect}") as caught:
            assert check.finish() == [str(caught[0].message)]
        assert caught[0].filename == __file__
        check = self.check(np.full((8, 5), far), strict=False)
        with pytest.warns(UserWarning, match=f", far outside of .*{expect}"):
            check.finish()

    def test_far_outside_raises_early(self):
        check = ElectronCheck(contract("electrons_per_pattern"), (64, 4))
        for _ in range(7):
            check.add(np.full(4, 0.1))
        with pytest.raises(ValueError, match=r"are 0\.1, far outside of"):
            check.add(np.full(4, 0.1))

    def test_far_outside_raises_at_the_end(self):
        electrons = np.full((8, 5), 0.1)
        electrons[:2] = 100
        with pytest.raises(ValueError, match=r"far outside of .*strict=False"):
            self.check(electrons).finish()

    def test_nothing_measured(self):
        check = self.check(np.zeros((3, 4)), np.ones((3, 4), bool))
        assert math.isnan(check.median)
        assert check.finish() == []
