"""The start-up hook, in fresh processes: what it does and what it costs."""

from __future__ import annotations

import shutil
import sys
import textwrap
import zipfile

import pytest
from environments import OPT_OUT, STARTUP, dependency_folders
from stand_ins import only_line, script, write_stand_in

HOOK = STARTUP / "mergekit_monosoup.pth"
CALL = "from mergekit_monosoup import autoload; "


class TestFiles:
    def test_pth_is_one_line_of_ascii_that_site_executes(self):
        text = HOOK.read_bytes().decode("ascii")
        assert text.count("\n") == 1
        assert text.endswith("\n")
        assert text.startswith("import ")

    def test_start_file_names_the_entry_point_of_the_pth(self, environment):
        """PEP 829: UTF-8 lines `module:callable`, resolved by pkgutil and called without arguments."""
        lines = (STARTUP / "mergekit_monosoup.start").read_text("utf-8").splitlines()
        entries = [line for line in lines if line.strip() and not line.startswith("#")]
        assert entries == ["mergekit_monosoup.autoload:install"]
        code = f"""
            import pkgutil, sys
            pkgutil.resolve_name({entries[0]!r})()
            print([type(f).__module__ for f in sys.meta_path].count("mergekit_monosoup.autoload"))
        """
        assert environment.output("-S", *script(code), PYTHONPATH=str(environment.site)) == "1"


class TestCost:
    def test_startup_imports_only_the_standard_library(self, environment):
        show = ("-c", "import sys; print(*sorted(sys.modules))")
        with_hook = set(environment.output(*show).split())
        for file in STARTUP.iterdir():
            (environment.site / file.name).unlink()
        added = with_hook - set(environment.output(*show).split())
        ours = {"mergekit_monosoup", "mergekit_monosoup.autoload"}
        assert ours <= added
        assert {name.partition(".")[0] for name in added - ours} <= set(sys.stdlib_module_names)

    def test_startup_takes_less_than_five_milliseconds(self, environment, tmp_path):
        """The smallest of many runs: the machine may be busy, the work is always the same."""
        code = f"""
            import sys, time
            sys.path.insert(0, {str(environment.site)!r})
            line = open({str(HOOK)!r}).read()
            start = time.perf_counter()
            exec(line)
            print(time.perf_counter() - start, "mergekit_monosoup.autoload" in sys.modules)
        """
        for file in STARTUP.iterdir():
            (environment.site / file.name).unlink()
        runs = [environment.output(*script(code)).split() for _ in range(12)]
        assert all(loaded == "True" for _, loaded in runs)
        assert min(float(seconds) for seconds, _ in runs) < 5e-3

    def test_other_imports_are_left_to_the_other_finders(self, stand_in):
        code = CALL + textwrap.dedent("""
            import sys
            finder = sys.meta_path[0]
            assert type(finder).__module__ == autoload.__name__
            for name in ("json", "mergekit", "mergekit.merge", "mergekit.merge_methods.base", "x.y"):
                assert finder.find_spec(name, None, None) is None
            import mergekit.trouble
            print(sys.meta_path[0] is finder)
        """)
        assert stand_in.output("-c", code) == "True"


class TestRegistration:
    def test_real_mergekit(self, environment):
        environment.see(*dependency_folders())
        code = """
            import sys
            import mergekit.merge_methods as m
            from importlib.machinery import SourceFileLoader
            assert type(m.__spec__.loader) is type(m.__loader__) is SourceFileLoader
            assert not any(type(f).__module__.startswith("mergekit_monosoup") for f in sys.meta_path)
            print(m.get("monosoup").spec.name)
        """
        assert environment.output(*script(code)) == "monosoup"

    @pytest.mark.parametrize(
        "statement",
        [
            "import mergekit.merge_methods",
            "import mergekit.merge_methods.base",
            "from mergekit import merge_methods",
        ],
    )
    def test_follows_the_module_s_own_execution(self, stand_in, statement):
        code = f"""
            {statement}
            import sys
            m = sys.modules["mergekit.merge_methods"]
            print(*m.events, any(type(f).__name__ == "_Finder" for f in sys.meta_path))
        """
        assert stand_in.output(*script(code)) == "started finished registered False"

    def test_loader_and_spec_stay_the_original_ones(self, stand_in):
        code = """
            import importlib, importlib.util, inspect
            from importlib.machinery import SourceFileLoader
            probed = importlib.util.find_spec("mergekit.merge_methods")  # does not import: no registration
            assert type(probed.loader) is SourceFileLoader
            import mergekit.merge_methods as m
            assert m.registered() == 1
            for loader in (m.loader_seen, m.spec_seen, m.__loader__, m.__spec__.loader):
                assert type(loader) is SourceFileLoader
                assert loader is m.__loader__
                assert "exec_module" not in vars(loader)
            assert "events" in inspect.getsource(m)
            assert importlib.reload(m) is m
            assert type(m.__spec__.loader) is SourceFileLoader and m.__loader__ is m.__spec__.loader
            print(*m.events)
        """
        assert stand_in.output(*script(code)) == "started finished"

    def test_error_of_the_import_passes_and_a_retry_registers(self, stand_in):
        code = """
            import mergekit.trouble
            class Unlucky(BaseException): pass
            error = Unlucky()
            def trouble(): raise error
            good, mergekit.trouble.trouble = mergekit.trouble.trouble, trouble
            for _ in range(2):
                try:
                    import mergekit.merge_methods
                except Unlucky as caught:
                    assert caught is error and caught.__cause__ is None and caught.__context__ is None
            mergekit.trouble.trouble = good
            import mergekit.merge_methods as m
            print(*m.events)
        """
        assert stand_in.output(*script(code)) == "started finished registered"

    def test_mergekit_imported_first(self, stand_in):
        code = f"""
            import mergekit.merge_methods as m
            {CALL}
            autoload.install()
            assert autoload.opted_out() is False
            print(m.registered())
        """
        arguments = ("-S", *script(code))
        assert stand_in.output(*arguments, PYTHONPATH=str(stand_in.site)) == "1"
        opted_out = stand_in.run(*arguments, PYTHONPATH=str(stand_in.site), **{OPT_OUT: "0"})
        assert "AssertionError" in opted_out.stderr
        code = code.replace("is False", "is True")
        arguments = ("-S", *script(code))
        assert stand_in.output(*arguments, PYTHONPATH=str(stand_in.site), **{OPT_OUT: "0"}) == "0"

    def test_install_is_idempotent(self, stand_in):
        """Python itself runs the start-up files of a virtual environment twice."""
        code = CALL + textwrap.dedent(f"""
            import importlib, site, sys
            autoload.install()
            site.addsitedir({str(stand_in.site)!r})
            importlib.reload(autoload).install()
            print([type(f).__module__ for f in sys.meta_path].count(autoload.__name__))
            import mergekit.merge_methods as m
            print(m.registered())
        """)
        assert stand_in.output("-c", code).split() == ["1", "1"]

    def test_threads_that_import_at_once_all_see_the_methods(self, stand_in):
        code = """
            import threading, mergekit.trouble, time
            mergekit.trouble.trouble = lambda: time.sleep(0.2)
            seen, gate = [], threading.Barrier(8)
            def work():
                gate.wait()
                import mergekit.merge_methods as m
                seen.append(m.registered())
            threads = [threading.Thread(target=work) for _ in range(8)]
            for t in threads: t.start()
            for t in threads: t.join()
            print(seen == [1] * 8)
        """
        assert stand_in.output(*script(code)) == "True"

    def test_mergekit_in_an_archive(self, stand_in, tmp_path):
        """One loader object serves all modules of an archive."""
        shutil.rmtree(stand_in.site / "mergekit")
        write_stand_in(tmp_path / "content")
        archive = tmp_path / "mergekit.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in (tmp_path / "content").rglob("*.py"):
                file.write(path, path.relative_to(tmp_path / "content"))
        code = """
            import importlib.util, zipimport
            for _ in range(3):
                importlib.util.find_spec("mergekit.merge_methods")
            import mergekit.merge_methods.base
            m = mergekit.merge_methods
            assert type(m.__loader__) is zipimport.zipimporter and "exec_module" not in vars(m.__loader__)
            print(*m.events)
        """
        done = stand_in.output(*script(code), PYTHONPATH=str(archive))
        assert done == "started finished registered"

    @pytest.mark.parametrize("kind", ["a class", "an object with __slots__", "an object without exec_module"])
    def test_loader_that_cannot_be_followed(self, stand_in, kind):
        """Such loaders come with some frozen applications; mergekit works, with one warning."""
        code = f"""
            import sys
            from importlib.machinery import ModuleSpec
            def run(module): exec("events = ['finished']", vars(module))
            class Class:
                create_module = staticmethod(lambda spec: None)
                exec_module = staticmethod(run)
            class Slots:
                __slots__ = ()
                def create_module(self, spec): return None
                def exec_module(self, module): run(module)
            class Old:
                def load_module(self, name):
                    module = sys.modules[name] = type(sys)(name)
                    run(module)
                    return module
            loader = dict(zip(("a class", "an object with __slots__"), (Class, Slots()))).get({kind!r}, Old())
            class Finder:
                def find_spec(self, name, path=None, target=None):
                    return ModuleSpec(name, loader) if name == "mergekit.merge_methods" else None
            sys.meta_path.insert(1, Finder())
            import mergekit.merge_methods as m
            print(*m.events, type(sys.meta_path[0]).__module__)
        """
        done = stand_in.run("-W", "ignore", *script(code))
        assert done.stdout.split()[0] == "finished", done.stderr
        assert "mergekit_monosoup" not in done.stdout
        assert "loader" in only_line(done.stderr)


class TestOptOut:
    COUNT = "import mergekit.merge_methods as m; print(m.registered())"

    @pytest.mark.parametrize("value", ["0", "false", "False", "off", "OFF", "no", " 0 "])
    def test_values_that_switch_off(self, stand_in, value):
        assert stand_in.output("-c", self.COUNT, **{OPT_OUT: value}) == "0"

    @pytest.mark.parametrize("value", ["", "1", "true", "on", "yes"])
    def test_values_that_do_not(self, stand_in, value):
        assert stand_in.output("-c", self.COUNT, **{OPT_OUT: value}) == "1"

    def test_read_when_mergekit_is_imported(self, stand_in):
        late = f"import os; os.environ['{OPT_OUT}'] = '0'; {self.COUNT}"
        assert stand_in.output("-c", late) == "0"
        withdrawn = f"import os; del os.environ['{OPT_OUT}']; {self.COUNT}"
        assert stand_in.output("-c", withdrawn, **{OPT_OUT: "0"}) == "1"
