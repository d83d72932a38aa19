//! `inspect` for people. Every text in a manifest has been checked to be without control characters.

use std::io::{Result, Write};

use super::view::View;

/// Prints `view`; with `digests`, also that of every chunk.
pub(crate) fn print(view: &View<'_>, digests: bool, out: &mut impl Write) -> Result<()> {
    about(view, out)?;
    requirements(view, out)?;
    memory(view, digests, out)?;
    disks(view, out)?;
    sections(view, out)
}

fn about(view: &View<'_>, out: &mut impl Write) -> Result<()> {
    let (header, metadata) = (view.header, view.metadata);
    writeln!(out, "{}", header.id)?;
    writeln!(out, "  made      {}", header.created)?;
    if let Some(name) = &metadata.name {
        writeln!(out, "  name      {name}")?;
    }
    if let Some(source) = &metadata.source {
        writeln!(out, "  source    {source}")?;
    }
    if let Some(parent) = &metadata.parent {
        writeln!(out, "  parent    {parent}")?;
    }
    for (key, value) in &metadata.labels {
        writeln!(out, "  label     {key}={value}")?;
    }
    writeln!(out, "  producer  {}", metadata.producer)?;
    writeln!(
        out,
        "  format    {}, for readers of format {} and newer",
        header.format_version, header.minimum_reader
    )?;
    writeln!(
        out,
        "  manifest  {} bytes, BLAKE3 {}",
        header.total_length, view.manifest_digest
    )
}

fn requirements(view: &View<'_>, out: &mut impl Write) -> Result<()> {
    let required = view.requirements;
    writeln!(out, "requires of a host")?;
    writeln!(
        out,
        "  CPU       {} of {}, shown as {}",
        required.arch, required.cpu_vendor, required.cpu_baseline
    )?;
    for word in &required.cpuid {
        writeln!(
            out,
            "  CPUID     {:#x}.{:#x} {} {:#010x}",
            word.leaf, word.subleaf, word.register, word.bits
        )?;
    }
    writeln!(out, "  XSAVE     {} bytes", required.xsave_size)?;
    writeln!(out, "  MSRs      {}", required.msrs.len())?;
    if let Some(tsc) = required.tsc {
        let how = if tsc.exact { "exactly" } else { "or any other" };
        writeln!(out, "  TSC       {} kHz, {how}", tsc.khz)?;
    }
    for capability in &required.kvm_capabilities {
        writeln!(
            out,
            "  KVM       {} ({}) of at least {}",
            capability.name, capability.number, capability.minimum
        )?;
    }
    for device in &required.devices {
        writeln!(out, "  device    {}, a {}", device.id, device.model)?;
    }
    Ok(())
}

fn memory(view: &View<'_>, digests: bool, out: &mut impl Write) -> Result<()> {
    let memory = &view.memory;
    writeln!(
        out,
        "memory of {} bytes, in {} chunks of up to {} bytes, {} of them zero",
        memory.bytes, memory.chunks, memory.chunk_size, memory.zero_chunks
    )?;
    for region in &memory.regions {
        writeln!(
            out,
            "  region    {:#014x}, {} bytes, at {} of the image",
            region.guest_start, region.length, region.file_offset
        )?;
    }
    if digests {
        for (index, digest) in memory.digests.iter().enumerate() {
            match digest {
                Some(digest) => writeln!(out, "  chunk     {index} {digest}")?,
                None => writeln!(out, "  chunk     {index} zero")?,
            }
        }
    }
    Ok(())
}

fn disks(view: &View<'_>, out: &mut impl Write) -> Result<()> {
    writeln!(out, "disks: {}", view.disks.len())?;
    for disk in view.disks {
        let access = if disk.read_only { ", read-only" } else { "" };
        writeln!(
            out,
            "  {}: layer {} of backend {}, {} bytes{access}",
            disk.id, disk.layer, disk.backend, disk.size
        )?;
    }
    Ok(())
}

fn sections(view: &View<'_>, out: &mut impl Write) -> Result<()> {
    writeln!(out, "sections: {}", view.sections.len())?;
    for section in &view.sections {
        let need = if section.required {
            "required"
        } else {
            "optional"
        };
        writeln!(
            out,
            "  {}/{} version {}, {need}, {} bytes at {}, CRC-32C {:08x}",
            section.kind,
            section.instance,
            section.version,
            section.length,
            section.offset,
            section.checksum
        )?;
    }
    Ok(())
}
