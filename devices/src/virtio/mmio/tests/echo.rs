//! The simplest device there is: it copies what a chain has to read into what it has to write.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::{QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::{Activation, DeviceError, VirtioDevice};

pub(super) const FEATURE: u64 = 1 << 5;
pub(super) const MAX_SIZES: [u16; 2] = [16, 8];

#[derive(Debug)]
pub(super) struct Echo {
    pub(super) config: [u8; 8],
    pub(super) refuse: bool,
    pub(super) broken: bool,
    pub(super) active: Option<Activation>,
    pub(super) quiesced: bool,
    events: Vec<Arc<EventFd>>,
}

impl Echo {
    pub(super) fn new() -> Arc<Mutex<Self>> {
        let events = MAX_SIZES
            .iter()
            .map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()))
            .collect();
        Arc::new(Mutex::new(Self {
            config: *b"config!!",
            refuse: false,
            broken: false,
            active: None,
            quiesced: false,
            events,
        }))
    }

    pub(super) fn change_config(&mut self, config: [u8; 8]) {
        self.config = config;
        if let Some(active) = &self.active {
            active.interrupt.config_change().unwrap();
        }
    }

    fn work(&mut self) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        if self.quiesced || self.broken {
            return Ok(());
        }
        let memory = &*active.memory;
        for queue in active.queues.iter_mut().filter(|q| q.ready()) {
            loop {
                queue.disable_notification(memory)?;
                while let Some(chain) = queue.iter(memory)?.next() {
                    let head = chain.head_index();
                    let mut reader = chain.clone().reader(memory)?;
                    let mut writer = chain.writer(memory)?;
                    let mut bytes = vec![0; reader.available_bytes().min(4096)];
                    reader.read_exact(&mut bytes).unwrap();
                    let len = writer.write(&bytes).unwrap();
                    queue.add_used(memory, head, u32::try_from(len).unwrap())?;
                    if queue.needs_notification(memory)? {
                        active.interrupt.used_buffer().unwrap();
                    }
                }
                if !queue.enable_notification(memory)? {
                    break;
                }
            }
        }
        Ok(())
    }

    fn work_or_break(&mut self) {
        if self.work().is_err() {
            self.broken = true;
            let active = self.active.as_ref().unwrap();
            active.interrupt.config_change().unwrap();
        }
    }
}

impl MutEventSubscriber for Echo {
    fn init(&mut self, ops: &mut EventOps) {
        for event in &self.events {
            ops.add(Events::new(event.as_ref(), EventSet::IN)).unwrap();
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        for event in &self.events {
            let _ = event.read();
        }
        self.work_or_break();
    }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        // Bit 34 (packed rings) is the transport's to offer, which it does not.
        FEATURE | 1 << 34
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &MAX_SIZES
    }

    fn queue_events(&self) -> &[Arc<EventFd>] {
        &self.events
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rest = self.config.get(offset as usize..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (to, from) in self.config.iter_mut().skip(offset as usize).zip(data) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.refuse {
            return Err(DeviceError::Driver("refused by the test"));
        }
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.broken = false;
    }

    fn quiesce(&mut self) -> Result<Vec<QueueState>, DeviceError> {
        self.quiesced = true;
        Ok(self
            .active
            .iter()
            .flat_map(|a| a.queues.iter().map(|q| q.state()))
            .collect())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.quiesced = false;
        self.work_or_break();
        Ok(())
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}
