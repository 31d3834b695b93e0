"""Known vulnerabilities of what is installed; a line that says so where the data about them cannot be had."""

import json
import subprocess
import sys

COMMAND = ["pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"]


def main() -> int:
    """Run pip-audit; 1 if it knows of a vulnerability."""
    done = subprocess.run([sys.executable, "-m", *COMMAND], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print("audit skipped:", *done.stderr.strip().splitlines()[-1:])
        return 0
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        reasons = {package["skip_reason"].split(":")[0] for package in packages}
        print(f"audit skipped: no data about any of {len(packages)} packages:", *sorted(reasons)[:1])
        return 0
    for package in known:
        for fault in package["vulns"]:
            fixed = ", ".join(fault["fix_versions"]) or "no release"
            print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    print(f"audit: {len(known)} of {len(packages)} packages looked up")
    return int(any(package["vulns"] for package in known))


if __name__ == "__main__":
    sys.exit(main())
