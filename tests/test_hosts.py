"""Methods reach the host libraries whichever is imported first, and nothing is imported that wasn't asked for."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
import textwrap

import pytest

import airpi_py4d
from airpi_py4d.hosts import add_method, when_imported


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A package `airpi_host` whose module `inner` fails to be imported where a file `broken` lies beside it."""
    package = tmp_path / "airpi_host"
    package.mkdir()
    (package / "__init__.py").write_text("from airpi_host.inner import Class\n")
    (package / "inner.py").write_text(
        textwrap.dedent("""
        from pathlib import Path
        if Path(__file__).with_name("broken").exists():
            raise ZeroDivisionError("the host's own")
        class Class:
            pass
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield package
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.split(".")[0] == "airpi_host"]:
        del sys.modules[name]


@pytest.fixture
def calls():
    return []


def attach_to(calls):
    def attach(module):
        calls.append(module)
        module.Class.method = lambda self: "attached"

    return attach


class TestWhenImported:
    def test_before(self, host, calls):
        finders = list(sys.meta_path)
        when_imported("airpi_host.inner", attach_to(calls))
        assert not calls
        assert "airpi_host" not in sys.modules
        host = importlib.import_module("airpi_host")
        assert host.Class().method() == "attached"
        assert calls == [sys.modules["airpi_host.inner"]]
        assert sys.meta_path == finders

    def test_after(self, host, calls):
        host = importlib.import_module("airpi_host")
        finders = list(sys.meta_path)
        when_imported("airpi_host.inner", attach_to(calls))
        assert host.Class().method() == "attached"
        assert len(calls) == 1
        assert sys.meta_path == finders

    def test_once(self, host, calls):
        when_imported("airpi_host.inner", attach_to(calls))
        inner = importlib.import_module("airpi_host.inner")
        importlib.import_module("airpi_host.inner")
        importlib.reload(inner)
        assert len(calls) == 1

    def test_two_watchers(self, host, calls):
        when_imported("airpi_host.inner", attach_to(calls))
        when_imported("airpi_host.inner", attach_to(calls))
        finders = len(sys.meta_path)
        importlib.import_module("airpi_host")
        assert len(calls) == 2
        assert len(sys.meta_path) == finders - 2

    def test_failing_import(self, host, calls):
        """The host's own error arrives, and a second attempt is attached to."""
        finders = list(sys.meta_path)
        when_imported("airpi_host.inner", attach_to(calls))
        (host / "broken").touch()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="the host's own"):
                importlib.import_module("airpi_host")
        assert not calls
        assert "airpi_host.inner" not in sys.modules
        (host / "broken").unlink()
        assert importlib.import_module("airpi_host").Class().method() == "attached"
        assert len(calls) == 1
        assert sys.meta_path == finders

    def test_looking_is_not_importing(self, host, calls):
        when_imported("airpi_host.inner", attach_to(calls))
        (host / "__init__.py").write_text("")
        for _ in range(2):
            assert importlib.util.find_spec("airpi_host.inner").origin == str(host / "inner.py")
        assert not calls
        assert importlib.import_module("airpi_host.inner").Class().method() == "attached"

    def test_missing_module(self, host, calls):
        when_imported("airpi_host.nothing", attach_to(calls))
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'airpi_host\.nothing'"):
            importlib.import_module("airpi_host.nothing")
        assert importlib.util.find_spec("airpi_host.nothing") is None
        assert not calls

    def test_module_is_as_without_us(self, host, calls):
        when_imported("airpi_host.inner", attach_to(calls))
        inner = importlib.import_module("airpi_host.inner")
        plain = importlib.import_module("airpi_host")
        assert type(inner.__loader__) is type(inner.__spec__.loader) is type(plain.__spec__.loader)
        assert inner.__file__ == inner.__spec__.origin == str(host / "inner.py")
        assert "class Class" in inspect.getsource(inner.Class)


def run(code):
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


class TestHosts:
    def test_nothing_is_imported(self):
        run("""
            import sys
            import airpi_py4d
            heavy = {"py4DSTEM", "emdfile", "hyperspy", "pyxem", "libertem", "tensorflow", "keras", "onnxruntime",
                     "dask", "h5py", "matplotlib"}
            assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """)

    def test_hyperspy_first(self):
        pytest.importorskip("hyperspy.api")
        run("""
            import hyperspy.api as hs
            hs.signals.Signal2D
            import airpi_py4d
            assert hs.signals.Signal2D.airpi is airpi_py4d.hyperspy.airpi
        """)

    def test_hyperspy_second(self):
        pytest.importorskip("hyperspy.api")
        run("""
            import airpi_py4d
            import hyperspy.api as hs
            assert hs.signals.Signal2D.airpi is airpi_py4d.hyperspy.airpi
        """)

    def test_py4dstem_first(self, monkeypatch):
        """In this process, since py4DSTEM takes ten seconds; test_py4dstem.py imports it second."""
        py4DSTEM = pytest.importorskip("py4DSTEM")
        monkeypatch.delattr(py4DSTEM.DataCube, "airpi_reconstruct")
        importlib.reload(airpi_py4d)
        assert py4DSTEM.DataCube.airpi_reconstruct is airpi_py4d.py4dstem.airpi_reconstruct


def test_a_host_without_the_class_still_imports(tmp_path, monkeypatch):
    (tmp_path / "changed_host.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    when_imported("changed_host", lambda module: add_method(module.Signal2D, len))
    with pytest.warns(UserWarning, match="can't add its method: .*Signal2D"):
        module = importlib.import_module("changed_host")
    assert module.value == 1
