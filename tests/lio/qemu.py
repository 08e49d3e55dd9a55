"""The second engine: Debian's stock cloud kernel in qemu, without hardware's help; several times slower than `uml`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.lio.kernel import HERE, ROOT, Boot, EngineMissing, Job

#: Where `scripts/setup slow` unpacks the kernel: boot/vmlinuz-RELEASE and lib/modules/RELEASE.
_UNPACKED = ROOT / ".kernel"
_VIRTIOFSD = (Path("/usr/lib/qemu/virtiofsd"), Path("/usr/libexec/virtiofsd"))
_FIRST_MODULES = ("virtio_pci", "virtiofs")


class Qemu:
    """See `kernel.Engine`."""

    name = "qemu"

    def boot(self, job: Job) -> Boot:
        kernel, modules, daemon = _installed()
        socket = job.directory / "virtiofs"
        memory = f"memory-backend-memfd,id=memory,size={job.memory}M,share=on"
        # /dev/kvm may open and yet not carry a stock kernel: never detect it. One processor is faster than two.
        argv = [
            "sh", str(HERE / "qemu.sh"), str(daemon), str(socket),
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,tb-size=512", "-cpu", "max", "-smp", "1",
            "-m", f"{job.memory}M", "-object", memory, "-numa", "node,memdev=memory",
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
            "-chardev", f"socket,id=host,path={socket}",
            "-device", "vhost-user-fs-pci,chardev=host,tag=host,queue-size=1024",
            "-kernel", str(kernel), "-initrd", str(_initramfs(job.directory, modules)),
            "-append", f'console=ttyS0 quiet panic=-1 mitigations=off nokaslr stratus_job="{job.directory}"',
        ]  # fmt: skip
        return Boot(argv, {}, modules)


def _installed() -> tuple[Path, Path, Path]:
    kernels = sorted(_UNPACKED.glob("boot/vmlinuz-*"))
    daemon = next((path for path in _VIRTIOFSD if path.exists()), None)
    missing = [tool for tool in ("qemu-system-x86_64", "busybox", "modprobe") if shutil.which(tool) is None]
    if not kernels or daemon is None or missing:
        lacking = ", ".join([*missing, *([] if daemon else ["virtiofsd"]), *([] if kernels else [str(_UNPACKED)])])
        raise EngineMissing(f"qemu's kernel needs what is not here ({lacking}); as root: scripts/setup slow")
    release = kernels[-1].name.removeprefix("vmlinuz-")
    return kernels[-1], _UNPACKED / "lib/modules" / release, daemon


def _initramfs(directory: Path, modules: Path) -> Path:
    """init.sh with a busybox, and the modules that reach the host's root."""
    tree, archive = directory / "initramfs", directory / "initramfs.cpio"
    for each in ("bin", "dev", "mnt", "proc", "sys"):
        (tree / each).mkdir(parents=True)
    shutil.copy(HERE / "init.sh", tree / "init")
    (tree / "init").chmod(0o755)
    shutil.copy(shutil.which("busybox") or "", tree / "bin/busybox")
    for applet in ("sh", "mount", "mkdir", "insmod", "uname", "chmod", "chroot", "unshare", "sync", "sleep"):
        (tree / "bin" / applet).symlink_to("busybox")
    files = _module_files(modules)
    for file in files:
        shutil.copy(file, tree)
    (tree / "modules").write_text("".join(f"{file.name}\n" for file in files))
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    with archive.open("wb") as made:
        subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), stdout=made,
                       stderr=subprocess.DEVNULL, check=True)  # fmt: skip
    return archive


def _module_files(modules: Path) -> list[Path]:
    """_FIRST_MODULES and what they need, in the order to load them."""
    argv = ["modprobe", "-d", str(_UNPACKED), "-S", modules.name, "--show-depends", "--all", *_FIRST_MODULES]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    return list(dict.fromkeys(Path(line.removeprefix("insmod ").strip()) for line in lines if "insmod" in line))
