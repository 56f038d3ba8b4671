"""The documentation as a site: `make docs`.

    python packaging/documentation.py FOLDER

Takes README.md, CONTRIBUTING.md, CHANGELOG.md, SECURITY.md and docs/ as they are, for they are read on their own, too,
and turns their links into ones between pages. A link that leads nowhere is an error.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]

ABOVE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
"""Files that are not in docs/. README.md is the first page, and docs/README.md the list of all."""


def config(source: Path, site: Path) -> dict[str, object]:
    pages: list[dict[str, object]] = [{"Overview": "index.md"}, {"Documents": "documents.md"}]
    groups = re.split(r"^\*\*(\w+)\*\*", (HERE / "docs/README.md").read_text(), flags=re.M)[1:]
    for title, text in zip(groups[::2], groups[1::2], strict=True):
        names = re.findall(r"\]\(([\w-]+\.md)\)", text)
        pages.append({title: names})
    listed = {name for page in pages for names in page.values() if isinstance(names, list) for name in names}
    rest = sorted(path.name for path in source.glob("*.md") if path.name not in {"index.md", "documents.md", *listed})
    pages.append({"More": rest})
    return {
        "site_name": "samepage",
        "docs_dir": str(source),
        "site_dir": str(site),
        "nav": pages,
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.sections", "toc.follow", "content.code.copy"],
        },
        "markdown_extensions": ["tables", "admonition", "pymdownx.superfences", {"toc": {"permalink": True}}],
        "plugins": ["search"],
        "strict": True,
        "use_directory_urls": False,
        "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}},
    }


def gather(source: Path) -> None:
    """All pages into one folder, with links that fit."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(HERE / "docs", source)
    shutil.move(source / "README.md", source / "documents.md")
    for name in ABOVE:
        if (HERE / name).exists():
            shutil.copy(HERE / name, source / ("index.md" if name == "README.md" else name))
    for path in source.rglob("*.md"):
        from_above = path.name == "index.md" or path.name in ABOVE
        parts = re.split(r"(\]\([^)#\s:]+)", path.read_text())
        parts[1::2] = [part[:2] + relinked(part[2:], from_above) for part in parts[1::2]]
        path.write_text("".join(parts))


def relinked(target: str, from_above: bool) -> str:
    """Where a link leads within the folder; what is no page (source files) stays a name."""
    name = target.removeprefix("docs/") if from_above else target
    if name in ("../README.md", "README.md"):
        front = name.startswith("..") or (from_above and target == "README.md")
        return "index.md" if front else "documents.md"
    return name.removeprefix("../")


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    source = site.parent / "site-pages"
    gather(source)
    shutil.copy(HERE / "LICENSE", source)
    file = site.parent / "mkdocs.yml"
    file.write_text(json.dumps(config(source, site), indent=1))  # which is YAML
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean", "--config-file", file], check=True)
    print(site / "index.html")


if __name__ == "__main__":
    main()
