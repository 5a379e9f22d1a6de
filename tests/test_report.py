"""Summary and report: what is shown of a result, and that nothing of it gets into the page as markup."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from airpi_py4d import Acquisition, Reconstruction
from airpi_py4d.report import confidence_histogram

WARNING = "scan_step is 2 A, outside of 0.1 to 0.8 lambda / alpha."


def provenance(**options):
    bad_pixels = np.zeros((64, 64), bool)
    bad_pixels[3, :12] = True
    descan = np.zeros((3, 4, 2))
    descan[2, 3] = (1.5, -0.25)
    calibration = Acquisition(
        300e3,
        20.0,
        (0.2, 0.4),
        (0.05, 0.05),
        bad_pixels=bad_pixels,
        descan=descan,
        sources={"scan_step": "metadata", "bad_pixels": "measured from <the> scan"},
    )
    return {
        "software": "airpi_py4d",
        "version": "0.1.0",
        "acquisition": calibration.describe(),
        "scan_shape": [3, 4],
        "detector_shape": [64, 64],
        "electrons_per_pattern": 1234.5,
        "model": {
            "name": "airpi-2",
            "version": "1",
            "sha256": "0123456789abcdef" * 4,
            "domain": {"energy": [3e4, 3e5], "relative_scan_step": [0.094, 0.844]},
        },
        "outside_training_domain": [WARNING],
        "data_checks": ["2 of 12 patterns are missing"],
        "provider": "CPUExecutionProvider",
        "seconds": 2.5,
        "positions_per_second": 1700.4,
        **options,
    }


def result(**options):
    confidence = np.linspace(0, 1, 100).reshape(10, 10)
    phase = np.linspace(-0.5, 1.0, 100).reshape(10, 10)
    wave = (confidence * np.exp(1j * phase)).astype(np.complex64)
    return Reconstruction(wave, (0.1, 0.2), provenance(**options))


class Page(HTMLParser):
    """Tags, text and whether every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestSummary:
    def test_parameters(self):
        lines = {line.split(":")[0].strip(): line.split(": ")[1] for line in result().summary().splitlines()}
        assert lines["energy"] == "3e+05 eV (argument)"
        assert lines["scan_step"] == "0.2, 0.4 A (metadata)"
        assert lines["transpose"] == "no (argument)"
        assert lines["bad_pixels"] == "12 px (measured from <the> scan)"
        assert lines["descan"].startswith("1.5, 0.25 px from the smallest to the largest")
        assert "center" not in lines
        assert lines["model"] == "airpi-2 1 (SHA-256 0123456789ab)"
        assert lines["provider"] == "CPUExecutionProvider"
        assert lines["image"] == "10 x 10 px of 0.1 x 0.2 A, 1700 positions/s"
        assert lines["confidence"] == result().confidence_summary()

    def test_square_pixels(self):
        square = Reconstruction(np.ones((3, 4), np.complex64), (0.2, 0.2), {})
        assert "3 x 4 px of 0.2 A, 0 positions/s" in square.summary()


class TestConfidence:
    def test_line(self):
        """Of 100 pixels 0, 1/99 ... 1 the first has none, 10 of the other 99 are above 0.9."""
        expected = "median 0.505, above 0.9 in 10.1 % of the image, 1.00 % of it not measured"
        assert result().confidence_summary() == expected

    def test_no_hole(self):
        line = Reconstruction(np.full((3, 4), 0.95j, np.complex64), (1, 1), {}).confidence_summary()
        assert line == "median 0.950, above 0.9 in 100.0 % of the image"

    def test_nothing(self):
        empty = Reconstruction(np.zeros((3, 4), np.complex64), (1, 1), {})
        assert empty.confidence_summary() == "nothing was measured"
        assert "nothing was measured" in str(empty.report())
        assert "nothing was measured" in empty.report()._repr_html_()

    def test_histogram(self):
        """Rounding above 1 stays in the last interval."""
        histogram = confidence_histogram(np.float32([0, 0.05, 0.6, 0.7, 0.9985, 1.0, 1.0000001]))
        assert [(low, high) for low, high, part in histogram if part] == [
            (0, 0.5),
            (0.5, 0.9),
            (0.998, 0.999),
            (0.999, 1),
        ]
        np.testing.assert_allclose([part for _, _, part in histogram if part], [1 / 6, 2 / 6, 1 / 6, 2 / 6])


class TestText:
    def test_content(self):
        text = str(result().report())
        for shown in (
            "AIRPI phase image, 10 x 10 px of 0.1 x 0.2 A",
            "0.2, 0.4 A (metadata)",
            "12 px (measured from <the> scan)",
            "0123456789abcdef" * 4,
            "0.094 to 0.844 lambda / alpha",
            f"  - {WARNING}\n  - 2 of 12 patterns are missing",
            "CPUExecutionProvider",
            "1700 positions/s, 2.5 s in all",
            "1234 a pattern",
            "-0.4848 to 1 rad, median 0.2576 rad",
            result().confidence_summary(),
        ):
            assert shown in text
        assert repr(result().report()) == text

    def test_bars(self):
        wave = np.repeat([0.05, 0.94], [25, 75]).astype(np.complex64).reshape(10, 10)
        lines = str(Reconstruction(wave, (1, 1), {}).report()).splitlines()
        assert f"  0.0   to 0.5   |{'#' * 10}{' ' * 30}|  25.0 %" in lines
        assert f"  0.9   to 0.95  |{'#' * 30}{' ' * 10}|  75.0 %" in lines

    def test_no_warnings(self):
        report = result(outside_training_domain=[], data_checks=[]).report()
        assert "\nWarnings\n  none\n" in str(report)
        assert "<h4>Warnings</h4><p>none</p>" in report._repr_html_()

    @pytest.mark.parametrize(("phase", "folds"), [(2.7, False), (3.0, True), (-3.0, True)])
    def test_folding(self, phase, folds):
        report = Reconstruction(np.full((3, 3), np.exp(1j * phase), np.complex64), (1, 1), {}).report()
        assert ("near pi phases fold" in str(report)) == folds

    def test_holes_have_no_phase(self):
        wave = np.full((3, 3), np.exp(1j), np.complex64)
        wave[1, 1] = 0
        assert "1 to 1 rad, median 1 rad" in str(Reconstruction(wave, (1, 1), {}).report())


class TestHtml:
    def test_content(self):
        page = Page(result().report()._repr_html_())
        assert page.open == []
        text = "\n".join(page.text)
        for shown in (
            "AIRPI phase image, 10 x 10 px of 0.1 x 0.2 A",
            "0.2, 0.4 A",
            "metadata",
            "measured from <the> scan",
            WARNING,
            "2 of 12 patterns are missing",
            "0123456789abcdef" * 4,
            "0.094 to 0.844 lambda / alpha",
            "CPUExecutionProvider",
        ):
            assert shown in text

    def test_everything_is_escaped(self):
        evil = '<script>alert("&")</script>'
        entry = {"value": evil, "unit": evil, "source": evil}
        options = {
            "software": evil,
            "version": evil,
            "acquisition": {evil: entry},
            "model": {"name": evil, "version": evil, "sha256": evil, "domain": {evil: [0, 1]}},
            "outside_training_domain": [evil],
            "data_checks": [evil],
            "provider": evil,
            "scan_shape": [evil],
        }
        page = result(**options).report()._repr_html_()
        assert "<script" not in page
        parsed = Page(page)
        assert "script" not in parsed.tags
        assert "\n".join(parsed.text).count(evil) == 14

    def test_svg(self):
        """Bars as tall as the histogram says, standing on the axis."""
        page = result().report()._repr_html_()
        assert "matplotlib" not in page
        svg = ElementTree.fromstring(re.search("<svg.*</svg>", page).group())
        bars = [element for element in svg if element.tag.endswith("rect")]
        heights = np.array([float(bar.get("height")) for bar in bars])
        parts = np.array([part for _, _, part in confidence_histogram(result().confidence)])
        np.testing.assert_allclose(heights / 100, parts / parts.max(), atol=1e-3)
        np.testing.assert_allclose([float(bar.get("y")) for bar in bars], 100 - heights, atol=0.1)
        lefts = np.array([float(bar.get("x")) for bar in bars])
        assert (np.diff(lefts) > 0).all()


def test_nothing_known():
    report = Reconstruction(np.ones((3, 4), np.complex64), (0.2, 0.2), {}).report()
    assert "3 x 4 px" in str(report)
    assert Page(report._repr_html_()).open == []


def test_provenance_is_json():
    assert json.loads(json.dumps(provenance(), allow_nan=False)) == provenance()
