//! The i8042 keyboard controller, without a keyboard or a mouse: what a guest's driver asks when it
//! looks for one is answered at once (an empty controller lets Linux wait half a second for each
//! command), and the CPU's reset line works.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::sync::Arc;

use offshoot_snapshot_format::{Payload, SectionKind};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::{Error, ErrorKind};

/// The port for data.
pub const DATA_PORT: u16 = 0x60;
/// The port for status (read) and commands (written).
pub const COMMAND_PORT: u16 = 0x64;

/// Status: a byte waits at the data port.
const OUTPUT_FULL: u8 = 0x01;
/// Status: the system flag that the power-on test has set.
const SYSTEM: u8 = 0x04;
/// Status: the last byte written was a command.
const COMMAND_LAST: u8 = 0x08;
/// Status: the keyboard lock is open.
const UNLOCKED: u8 = 0x10;

/// Control: the keyboard's clock is held.
const KEYBOARD_OFF: u8 = 0x10;
/// Control: the mouse's clock is held.
const AUX_OFF: u8 = 0x20;
/// Control after power-on: nobody there, no interrupts, system flag.
const CONTROL: u8 = KEYBOARD_OFF | AUX_OFF | SYSTEM;

const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const DISABLE_AUX: u8 = 0xa7;
const ENABLE_AUX: u8 = 0xa8;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT: u8 = 0xd0;
const WRITE_OUTPUT: u8 = 0xd1;
const LOOP_KEYBOARD: u8 = 0xd2;
const LOOP_AUX: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
/// 0xf0 to 0xff pulse those lines low whose bit in the low nibble is 0; bit 0 is the reset.
const PULSE: u8 = 0xf0;

const SELF_TEST_PASSED: u8 = 0x55;
/// What a test of an empty socket finds: its clock line is stuck low.
const CLOCK_STUCK: u8 = 0x01;
/// The output port's reset line, active low, and its A20 gate.
const OUTPUT_PORT: u8 = 0x03;
const RESET_LINE: u8 = 0x01;

/// The controller's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The control byte.
    pub control: u8,
    /// The output port, the reset line (bit 0) always high.
    pub output_port: u8,
    /// The byte that waits at the data port.
    pub reply: Option<u8>,
    /// The command whose parameter comes next through the data port.
    pub pending: Option<u8>,
    /// Whether the last byte written was a command.
    pub command_last: bool,
}

impl Payload for I8042State {
    const KIND: SectionKind = SectionKind(*b"8042");
    const VERSION: u16 = 1;
}

/// The controller. It writes an eventfd when the guest asks for a reset.
#[derive(Debug)]
pub struct I8042 {
    state: I8042State,
    reset: Arc<EventFd>,
}

impl I8042 {
    /// A controller as after power-on.
    #[must_use]
    pub fn new(reset: Arc<EventFd>) -> Self {
        Self {
            state: I8042State {
                control: CONTROL,
                output_port: OUTPUT_PORT,
                reply: None,
                pending: None,
                command_last: false,
            },
            reset,
        }
    }

    /// A controller from saved state.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidState`] when a command is pending that takes no parameter, or the reset
    /// line is low.
    pub fn restore(state: I8042State, reset: Arc<EventFd>) -> Result<Self, Error> {
        let invalid = |context| Error::new(ErrorKind::InvalidState, "i8042", context);
        if state.pending.is_some_and(|c| !takes_parameter(c)) {
            return Err(invalid("the pending command takes no parameter"));
        }
        if state.output_port & RESET_LINE == 0 {
            return Err(invalid("the reset line is low"));
        }
        Ok(Self { state, reset })
    }

    /// The controller's state.
    #[must_use]
    pub fn save(&self) -> I8042State {
        self.state
    }

    /// A vCPU reads from `port`. Accesses wider than a byte, and other ports, read all ones.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        match (port, &mut *data) {
            (DATA_PORT, [byte]) => *byte = self.state.reply.take().unwrap_or(0),
            (COMMAND_PORT, [byte]) => *byte = self.status(),
            _ => data.fill(0xff),
        }
    }

    /// A vCPU writes to `port`. Accesses wider than a byte, and other ports, are ignored.
    pub fn write(&mut self, port: u16, data: &[u8]) {
        match (port, data) {
            (DATA_PORT, [byte]) => self.data(*byte),
            (COMMAND_PORT, [byte]) => self.command(*byte),
            _ => {}
        }
    }

    fn status(&self) -> u8 {
        let bits = [
            (self.state.reply.is_some(), OUTPUT_FULL),
            (self.state.control & SYSTEM != 0, SYSTEM),
            (self.state.command_last, COMMAND_LAST),
        ];
        bits.into_iter()
            .filter_map(|(set, bit)| set.then_some(bit))
            .fold(UNLOCKED, |status, bit| status | bit)
    }

    fn command(&mut self, command: u8) {
        let state = &mut self.state;
        state.command_last = true;
        state.pending = takes_parameter(command).then_some(command);
        match command {
            READ_CONTROL => state.reply = Some(state.control),
            READ_OUTPUT => state.reply = Some(state.output_port),
            SELF_TEST => {
                state.control = CONTROL;
                state.reply = Some(SELF_TEST_PASSED);
            }
            TEST_KEYBOARD | TEST_AUX => state.reply = Some(CLOCK_STUCK),
            DISABLE_KEYBOARD => state.control |= KEYBOARD_OFF,
            ENABLE_KEYBOARD => state.control &= !KEYBOARD_OFF,
            DISABLE_AUX => state.control |= AUX_OFF,
            ENABLE_AUX => state.control &= !AUX_OFF,
            PULSE.. if command & RESET_LINE == 0 => self.pull_reset(),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        let state = &mut self.state;
        state.command_last = false;
        match state.pending.take() {
            Some(WRITE_CONTROL) => state.control = byte,
            Some(WRITE_OUTPUT) if byte & RESET_LINE == 0 => self.pull_reset(),
            Some(WRITE_OUTPUT) => state.output_port = byte,
            Some(LOOP_KEYBOARD) => state.reply = Some(byte),
            // There is no second channel through which the byte could come back as it was sent.
            Some(LOOP_AUX) => state.reply = Some(!byte),
            // A byte for a keyboard or a mouse: nobody is there to answer.
            _ => {}
        }
    }

    fn pull_reset(&self) {
        if let Err(error) = self.reset.write(1) {
            tracing::error!(%error, "the guest's reset cannot be passed on");
        }
    }
}

fn takes_parameter(command: u8) -> bool {
    matches!(
        command,
        WRITE_CONTROL | WRITE_OUTPUT | LOOP_KEYBOARD | LOOP_AUX | WRITE_AUX
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, reason = "a test that panics has failed")]

    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn controller() -> (I8042, Arc<EventFd>) {
        let reset = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        (I8042::new(Arc::clone(&reset)), reset)
    }

    fn get(i8042: &mut I8042, port: u16) -> u8 {
        let mut byte = [0];
        i8042.read(port, &mut byte);
        byte[0]
    }

    fn ask(i8042: &mut I8042, command: u8, parameter: Option<u8>) -> u8 {
        i8042.write(COMMAND_PORT, &[command]);
        if let Some(parameter) = parameter {
            i8042.write(DATA_PORT, &[parameter]);
        }
        assert_eq!(get(i8042, COMMAND_PORT) & OUTPUT_FULL, OUTPUT_FULL);
        let reply = get(i8042, DATA_PORT);
        assert_eq!(get(i8042, COMMAND_PORT) & OUTPUT_FULL, 0);
        reply
    }

    #[test]
    fn the_reset_command_resets() {
        let (mut i8042, reset) = controller();
        for harmless in [0xff, 0xf1, 0x00, 0xfe & 0x7f] {
            i8042.write(COMMAND_PORT, &[harmless]);
        }
        i8042.write(DATA_PORT, &[0xfe]);
        i8042.write(COMMAND_PORT, &[0xfe, 0xfe]);
        assert!(reset.read().is_err());
        i8042.write(COMMAND_PORT, &[0xfe]);
        assert_eq!(reset.read().unwrap(), 1);
        i8042.write(COMMAND_PORT, &[WRITE_OUTPUT]);
        i8042.write(DATA_PORT, &[0xfe]);
        assert_eq!(reset.read().unwrap(), 1);
    }

    /// What Linux asks in its probe: each question has an answer, so that it waits for none.
    #[test]
    fn a_probe_is_answered() {
        let (mut i8042, _) = controller();
        assert_eq!(
            get(&mut i8042, COMMAND_PORT) & OUTPUT_FULL,
            0,
            "nothing to flush"
        );
        assert_eq!(ask(&mut i8042, READ_CONTROL, None), CONTROL);
        i8042.write(COMMAND_PORT, &[WRITE_CONTROL]);
        i8042.write(DATA_PORT, &[0x47]);
        assert_eq!(ask(&mut i8042, READ_CONTROL, None), 0x47);
        assert_ne!(ask(&mut i8042, LOOP_AUX, Some(0x5a)), 0x5a, "no mouse port");
        assert_eq!(ask(&mut i8042, TEST_AUX, None), CLOCK_STUCK);
        assert_eq!(ask(&mut i8042, SELF_TEST, None), SELF_TEST_PASSED);
        assert_eq!(ask(&mut i8042, LOOP_KEYBOARD, Some(7)), 7);
    }

    #[test]
    fn wide_accesses_and_other_ports() {
        let (mut i8042, _) = controller();
        let mut wide = [0; 2];
        i8042.read(DATA_PORT, &mut wide);
        assert_eq!(wide, [0xff; 2]);
        assert_eq!(get(&mut i8042, 0x61), 0xff);
    }

    #[test]
    fn impossible_state_is_refused() {
        let (i8042, reset) = controller();
        let good = i8042.save();
        let bad = [
            I8042State {
                pending: Some(0xfe),
                ..good
            },
            I8042State {
                output_port: 0,
                ..good
            },
        ];
        for state in bad {
            let error = I8042::restore(state, Arc::clone(&reset)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidState);
        }
    }

    proptest! {
        /// Whatever a guest does, its state can be saved, restored and saved again.
        #[test]
        fn arbitrary_accesses(accesses in prop::collection::vec((any::<bool>(), any::<Option<u8>>()), 0..50)) {
            let (mut i8042, reset) = controller();
            for (command, write) in accesses {
                let port = if command { COMMAND_PORT } else { DATA_PORT };
                match write {
                    Some(byte) => i8042.write(port, &[byte]),
                    None => drop(get(&mut i8042, port)),
                }
            }
            let state = i8042.save();
            prop_assert_eq!(I8042State::decode(1, &state.encode().unwrap()).unwrap(), state);
            prop_assert_eq!(I8042::restore(state, reset).unwrap().save(), state);
        }
    }
}
