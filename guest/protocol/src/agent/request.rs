//! What the host asks the agent.

use alloc::vec::Vec;
use core::net::IpAddr;

use super::declare::{owned, owned_messages};
use super::value::{ByteString, Generation, JobId};
use crate::declare::choices;
use crate::value::{Id, Mac};
use crate::wire::{Reader, Wire, WireError, WireErrorKind, Writer};

choices! {
    /// What becomes of a command when the connection that started it is lost.
    Lifetime {
        /// It is killed with its process group, and forgotten.
        #[default]
        Client = 1 "client",
        /// It goes on, and is remembered until it is forgotten.
        Own = 2 "own",
    }
}

choices! {
    /// How a file is written.
    WriteMode {
        /// To a new file that takes the name when all of it is there: whole or not at all.
        #[default]
        Replace = 1 "replace",
        /// At the end of the file, which is made when there is none.
        Append = 2 "append",
        /// Like `Replace`, and refused when the name is taken.
        CreateNew = 3 "create-new",
    }
}

choices! {
    /// A way for the guest to stop.
    PowerAction {
        /// Powers off.
        #[default]
        Off = 1 "off",
        /// Restarts.
        Reboot = 2 "reboot",
    }
}

/// Whose rights a command has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// A name of the guest's `/etc/passwd`, with all groups that it is in.
    Name(ByteString),
    /// Numbers, with no further groups.
    Ids {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
}

impl Wire for User {
    fn put(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        match self {
            Self::Name(name) => {
                1u8.put(writer)?;
                name.put(writer)
            }
            Self::Ids { uid, gid } => {
                2u8.put(writer)?;
                uid.put(writer)?;
                gid.put(writer)
            }
        }
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let bad = reader.error(WireErrorKind::BadValue);
        match reader.take::<u8>()? {
            1 => reader.take().map(Self::Name),
            2 => Ok(Self::Ids {
                uid: reader.take()?,
                gid: reader.take()?,
            }),
            _ => Err(bad),
        }
    }
}

owned! {
    /// A variable of the environment.
    EnvVar {
        /// Its name.
        name: ByteString,
        /// Its value; none takes the variable away.
        value: Option<ByteString>,
    }
}

owned! {
    /// The size of a terminal, in characters.
    #[derive(Copy, Hash)]
    WindowSize {
        /// Lines.
        rows: u16,
        /// Columns.
        columns: u16,
    }
}

owned! {
    /// A command to run, in a session and process group of its own.
    Exec {
        /// Program and arguments. A program without `/` is looked for in `PATH`.
        argv: Vec<ByteString>,
        /// Working directory; none is the user's home, or `/`.
        cwd: Option<ByteString>,
        /// On top of the agent's environment defaults.
        env: Vec<EnvVar>,
        /// Leaves out the agent's environment defaults.
        clean_env: bool,
        /// Whose rights it has; none is the agent's own.
        user: Option<User>,
        /// Its terminal; none gives it pipes.
        terminal: Option<WindowSize>,
        /// Gives it a standard input that the host writes to; else it reads `/dev/null`. With a
        /// terminal there always is one.
        input: bool,
        /// After how many milliseconds its process group is killed; 0 is never.
        time_limit_ms: u64,
        /// Bytes of output that are kept for whoever attaches later; 0 is the default.
        output_kept: u32,
        /// What becomes of it without its client.
        lifetime: Lifetime,
    }
}

owned! {
    /// An address with the size of its network.
    #[derive(Copy, Hash)]
    Address {
        /// The address.
        ip: IpAddr,
        /// Bits of it that name the network.
        prefix: u8,
    }
}

owned! {
    /// A way to a network.
    Route {
        /// The network; 0.0.0.0/0 or ::/0 for the default.
        to: Address,
        /// The next router; none when the network is on the link.
        gateway: Option<IpAddr>,
        /// Preference, the lowest first; none is the kernel's default.
        metric: Option<u32>,
    }
}

owned! {
    /// What a network interface is to be. The interface is found by its name, or it is the first
    /// that is no loopback when the name is empty.
    Link {
        /// Name in the guest.
        name: ByteString,
        /// Its Ethernet address from now on.
        mac: Option<Mac>,
        /// Its largest packet from now on.
        mtu: Option<u32>,
        /// Takes all addresses away first, and with them the routes that lead over them.
        replace: bool,
        /// Addresses to have; one that is there already is left.
        addresses: Vec<Address>,
        /// Routes to have.
        routes: Vec<Route>,
    }
}

owned! {
    /// What makes a guest that guest and no other. What is absent stays as it is.
    #[derive(Default)]
    Settings {
        /// Host name, also written to `/etc/hostname`.
        hostname: Option<ByteString>,
        /// Written to `/etc/machine-id`.
        machine_id: Option<Id>,
        /// Changes to the environment that commands start with.
        env: Vec<EnvVar>,
        /// Network interfaces; each is brought up.
        links: Vec<Link>,
        /// Name servers, written to `/etc/resolv.conf`; none leaves the file alone.
        resolvers: Vec<IpAddr>,
    }
}

owned! {
    /// Who a guest is from now on, after a boot, restore or fork.
    Identity {
        /// The generation that this is.
        generation: Generation,
        /// The host's time, in nanoseconds since 1970; 0 leaves the clock alone.
        unix_ns: u64,
        /// Random bytes, different for each guest.
        seed: Vec<u8>,
        /// The rest.
        settings: Settings,
        /// How long all hooks together may run, in milliseconds; 0 is the default.
        hook_limit_ms: u32,
    }
}

owned_messages! {
    /// What the host asks. The answer to each is named with it; a refusal is always possible.
    Request {
        /// Settles the version and says which generation is meant: the first message of each
        /// connection. Answer: `Hello`, and the request follows (it may be sent at once).
        Hello = 1 {
            /// Oldest version that the host speaks.
            oldest: u16,
            /// Newest version that the host speaks.
            newest: u16,
            /// The generation that the host talks to. Unless it is none, an agent of another
            /// one answers nothing but `Identify`.
            generation: Generation,
        }
        /// Gives the guest its identity. Every other connection ends, and nothing else is answered
        /// until it is done. Answer: `Ready`; for the generation that the agent has already, the
        /// report of the first time again, with nothing done.
        Identify = 2 {
            /// The identity.
            identity: Identity,
        }
        /// Changes settings outside of a fork. Answer: `Ready`.
        Configure = 3 {
            /// The settings.
            settings: Settings,
        }
        /// Figures of the guest. Answer: `Metrics`.
        Metrics = 4 {
            /// File systems to report on, by any path on them; none is `/`.
            paths: Vec<ByteString>,
        }
        /// Sets the wall clock. Answer: `Done`.
        SetClock = 5 {
            /// Nanoseconds since 1970.
            unix_ns: u64,
        }
        /// Writes everything to the disks. Answer: `Done`.
        Sync = 6 {}
        /// Ends every process, unmounts and stops. Answer: `Done`, then the end.
        Power = 7 {
            /// How.
            action: PowerAction,
        }
        /// Nothing. Answer: `Done`.
        Ping = 8 {}
        /// Runs a command. Answer: `Started`, then its output as raw frames, then `Exited`.
        /// Meanwhile the host may send `Data` and `End` for its standard input.
        Exec = 16 {
            /// The command.
            command: Exec,
        }
        /// Joins a command. Answer: `Attached`, then as for `Exec`.
        Attach = 17 {
            /// Which.
            job: JobId,
            /// The place in its output to start from; `u64::MAX` for what comes from now on.
            from: u64,
        }
        /// All commands that the agent knows. Answer: `Jobs`.
        Jobs = 18 {}
        /// Sends a signal. Answer: `Done`.
        Signal = 19 {
            /// To which command.
            job: JobId,
            /// Signal number, 1 to 64.
            signal: u8,
            /// To its whole process group, not to its first process only.
            group: bool,
        }
        /// Changes the size of a command's terminal. Answer: `Done`.
        Resize = 20 {
            /// Which command.
            job: JobId,
            /// The size.
            size: WindowSize,
        }
        /// Forgets a command that has ended, with its output. Answer: `Done`.
        Forget = 21 {
            /// Which.
            job: JobId,
        }
        /// Reads a file. Answer: `Opened`, its bytes in `Data` frames, `End`.
        Read = 32 {
            /// Which file.
            path: ByteString,
            /// First byte.
            offset: u64,
            /// The most bytes.
            len: u64,
        }
        /// Writes a file. Answer: `Opened`; then the host sends `Data` frames and `End`, and the
        /// answer to that is `Finished`. Without `End` the file stays as it was.
        Write = 33 {
            /// Which file; through symbolic links.
            path: ByteString,
            /// How.
            how: WriteMode,
            /// Its permissions; none keeps those of the file that is replaced, or is 0644.
            mode: Option<u32>,
            /// Its owner; none keeps that of the file that is replaced.
            owner: Option<User>,
            /// Answers only when file and name are on the disk.
            sync: bool,
        }
        /// Looks at a file. Answer: `Stat`.
        Stat = 34 {
            /// Which.
            path: ByteString,
            /// Looks at what a symbolic link points to.
            follow: bool,
        }
        /// Lists a directory. Answer: any number of `Entries`, then `End`.
        List = 35 {
            /// Which.
            path: ByteString,
        }
        /// Makes a directory. Answer: `Done`.
        MakeDir = 36 {
            /// Which.
            path: ByteString,
            /// Also makes what is missing above it, and is content when it is there already.
            parents: bool,
            /// Permissions.
            mode: u32,
        }
        /// Removes a file or directory. Answer: `Done`.
        Remove = 37 {
            /// Which.
            path: ByteString,
            /// With all that is in it; never across a mount.
            recursive: bool,
        }
        /// Renames a file or directory, over one that is there. Answer: `Done`.
        Rename = 38 {
            /// From.
            from: ByteString,
            /// To.
            to: ByteString,
        }
    }
}
