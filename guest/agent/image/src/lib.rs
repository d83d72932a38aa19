//! The agent as one static program for any Linux guest of this architecture, to be put into an
//! initramfs or an image. This package's build script builds it; `docs/agent.md` is about it.

/// The program: an ELF executable that needs nothing but the kernel.
pub const AGENT_ELF: &[u8] = include_bytes!(env!("OFFSHOOT_AGENT_IMAGE"));

#[cfg(test)]
mod tests {
    use super::AGENT_ELF;

    /// What docs/agent.md promises.
    #[test]
    fn the_program_is_static_and_small() {
        assert_eq!(AGENT_ELF.first_chunk(), Some(b"\x7fELF"));
        assert!(AGENT_ELF.len() < 2 << 20, "{} bytes", AGENT_ELF.len());
        // PT_INTERP, number 3, would be among the program headers (ELF64: 56 bytes from 64 on).
        let count = usize::from(AGENT_ELF[56]);
        let has_interpreter = (0..count).any(|n| AGENT_ELF[64 + 56 * n] == 3);
        assert!(!has_interpreter, "it is linked dynamically");
    }
}
