"""Known vulnerabilities of what is installed; a line that says so where the data about them cannot be had."""

import json
import subprocess
import sys
from typing import Any

COMMAND = ["-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"]
SECONDS = 300  # that the look-up may take in all


def main() -> int:
    """Run pip-audit; 1 if it knows of a vulnerability."""
    try:
        packages = looked_up()
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        print(f"audit skipped: {error}")
        return 0
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        reasons = sorted({package["skip_reason"].split(":")[0] for package in packages})
        print(f"audit skipped: no data about any of {len(packages)} packages:", *reasons[:1])
        return 0
    for package in known:
        for fault in package["vulns"]:
            fixed = ", ".join(fault["fix_versions"]) or "no release"
            print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    print(f"audit: {len(known)} of {len(packages)} packages looked up")
    return int(any(package["vulns"] for package in known))


def looked_up() -> list[dict[str, Any]]:
    """Return what pip-audit says of every package; ValueError where it says nothing that can be read."""
    done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, timeout=SECONDS)
    if not done.stdout:
        raise ValueError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip-audit said nothing")
    packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    return packages


if __name__ == "__main__":
    sys.exit(main())
