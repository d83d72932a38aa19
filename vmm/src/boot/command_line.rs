//! The kernel's command line.

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use offshoot_devices::GuestRam;
use vm_memory::GuestAddress;

use super::{BootError, MmioWindow, layout};
use crate::acpi::VIRTIO_WINDOW_LEN;

/// Where the command line lies, its final zero byte not counted in `len`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) start: GuestAddress,
    pub(super) len: u32,
}

/// Writes `text`, and `virtio_mmio.device=` for each of `windows` (Linux
/// `drivers/virtio/virtio_mmio.c`), into guest RAM.
pub(super) fn write(
    memory: &GuestRam,
    text: &str,
    windows: &[MmioWindow],
) -> Result<Placed, BootError> {
    let mut line = Cmdline::try_from(text, layout::COMMAND_LINE_MAX)?;
    for window in windows {
        line.add_virtio_mmio_device(
            u64::from(VIRTIO_WINDOW_LEN),
            GuestAddress(u64::from(window.base)),
            window.gsi,
            None,
        )?;
    }
    load_cmdline(memory, layout::COMMAND_LINE, &line).map_err(BootError::Load)?;
    let len = line.as_cstring()?.as_bytes().len();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "bounded by COMMAND_LINE_MAX"
    )]
    Ok(Placed {
        start: layout::COMMAND_LINE,
        len: len as u32,
    })
}
