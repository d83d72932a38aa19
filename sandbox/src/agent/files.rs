//! Files of the guest.

use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use offshoot_protocol::agent::frame::MAX_RAW;
use offshoot_protocol::agent::{Entry, RawKind, Reply, Request, User, WriteMode};

use super::Agent;
use super::channel::Incoming;
use crate::{Error, ErrorKind};

/// The most bytes that a listing may take, names and all.
const MAX_LISTING: usize = 32 << 20;

/// How a file is written.
#[derive(Debug, Clone, Default)]
pub struct WriteOptions {
    /// To a new file that takes the name at the end, which is the default, or at the old one's
    /// end.
    pub how: WriteMode,
    /// Permissions; none keeps those of a file that is replaced, or is 0644.
    pub mode: Option<u32>,
    /// Owner; none keeps that of a file that is replaced, or is the agent's user.
    pub owner: Option<User>,
    /// Comes back only when file and name are on the guest's disk.
    pub sync: bool,
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn host(operation: &'static str, error: io::Error) -> Error {
    Error::because(ErrorKind::Host, operation, error)
}

/// A name that means something in its directory only.
fn is_plain(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

impl Agent {
    /// Reads a piece of a file, `u64::MAX` bytes for all the rest, and writes it to `to` as it
    /// comes. Says how many bytes that were.
    ///
    /// # Errors
    /// `NotFound`; `Host` when `to` fails; then and on others, part of it may be written already.
    pub fn read_to(
        &self,
        path: impl AsRef<Path>,
        offset: u64,
        len: u64,
        to: &mut impl Write,
        deadline: Instant,
    ) -> Result<u64, Error> {
        const OPERATION: &str = "read a file";
        let path = bytes(path.as_ref());
        let channel = self.begin(OPERATION, &Request::Read { path, offset, len }, deadline)?;
        let Reply::Opened { .. } = channel.reply(deadline)? else {
            return Err(channel.error(ErrorKind::Untrustworthy));
        };
        let mut left = len;
        loop {
            match channel.next(deadline)? {
                Incoming::Raw(RawKind::Data, bytes) => {
                    let got = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                    left = left
                        .checked_sub(got)
                        .ok_or_else(|| channel.error(ErrorKind::Untrustworthy))?;
                    to.write_all(&bytes)
                        .map_err(|error| host(OPERATION, error))?;
                }
                Incoming::Raw(RawKind::End, _) => return Ok(len.saturating_sub(left)),
                _ => return Err(channel.error(ErrorKind::Untrustworthy)),
            }
        }
    }

    /// Reads a file of at most `most` bytes.
    ///
    /// # Errors
    /// `TooLarge` when it is longer.
    pub fn read_file(
        &self,
        path: impl AsRef<Path>,
        most: u64,
        deadline: Instant,
    ) -> Result<Vec<u8>, Error> {
        let mut content = Vec::new();
        let got = self.read_to(path, 0, most.saturating_add(1), &mut content, deadline)?;
        match got > most {
            true => Err(Error::new(ErrorKind::TooLarge, "read a file")),
            false => Ok(content),
        }
    }

    /// Writes all that `from` gives to a file. Says how many bytes that were. Given up before the
    /// end, a file that was to be replaced stays as it was.
    ///
    /// # Errors
    /// `Host` when `from` fails; `Guest` with the error number when its disk is full, say.
    pub fn write_from(
        &self,
        path: impl AsRef<Path>,
        options: &WriteOptions,
        from: &mut impl Read,
        deadline: Instant,
    ) -> Result<u64, Error> {
        const OPERATION: &str = "write a file";
        let request = Request::Write {
            path: bytes(path.as_ref()),
            how: options.how,
            mode: options.mode,
            owner: options.owner.clone(),
            sync: options.sync,
        };
        let channel = self.begin(OPERATION, &request, deadline)?;
        let Reply::Opened { .. } = channel.reply(deadline)? else {
            return Err(channel.error(ErrorKind::Untrustworthy));
        };
        let mut buffer = vec![0; MAX_RAW];
        let mut sent = 0u64;
        loop {
            let got = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(host(OPERATION, error)),
            };
            // An answer before the end is a refusal: the rest need not be sent.
            if channel.has_answer() {
                channel.reply(deadline)?;
                return Err(channel.error(ErrorKind::Untrustworthy));
            }
            channel.raw(
                RawKind::Data,
                buffer.get(..got).unwrap_or_default(),
                deadline,
            )?;
            sent = sent.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
        }
        channel.raw(RawKind::End, &[], deadline)?;
        match channel.reply(deadline)? {
            Reply::Finished { bytes } if bytes == sent => Ok(sent),
            _ => Err(channel.error(ErrorKind::Untrustworthy)),
        }
    }

    /// Replaces a file, or makes it.
    ///
    /// # Errors
    /// As [`write_from`](Self::write_from).
    pub fn write_file(
        &self,
        path: impl AsRef<Path>,
        content: &[u8],
        deadline: Instant,
    ) -> Result<(), Error> {
        let mut content = content;
        self.write_from(path, &WriteOptions::default(), &mut content, deadline)?;
        Ok(())
    }

    /// Adds to the end of a file, which is made when there is none.
    ///
    /// # Errors
    /// As [`write_from`](Self::write_from).
    pub fn append_file(
        &self,
        path: impl AsRef<Path>,
        content: &[u8],
        deadline: Instant,
    ) -> Result<(), Error> {
        let mut content = content;
        let options = WriteOptions {
            how: WriteMode::Append,
            ..WriteOptions::default()
        };
        self.write_from(path, &options, &mut content, deadline)?;
        Ok(())
    }

    /// Looks at a file; at what a symbolic link points to if it is to be followed.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stat(
        &self,
        path: impl AsRef<Path>,
        follow: bool,
        deadline: Instant,
    ) -> Result<Entry, Error> {
        let path = bytes(path.as_ref());
        let request = Request::Stat { path, follow };
        self.ask("look at a file", &request, deadline, |reply| match reply {
            Reply::Stat { entry } => Some(entry),
            _ => None,
        })
    }

    /// Lists a directory, in no order. The names are plain ones: none has a `/` in it.
    ///
    /// # Errors
    /// `TooLarge` for a directory of some hundred thousand files.
    pub fn list(&self, path: impl AsRef<Path>, deadline: Instant) -> Result<Vec<Entry>, Error> {
        let path = bytes(path.as_ref());
        let channel = self.begin("list a directory", &Request::List { path }, deadline)?;
        let mut all: Vec<Entry> = Vec::new();
        let mut size = 0usize;
        loop {
            match channel.next(deadline)? {
                Incoming::Reply(Reply::Entries { entries }) => {
                    for entry in &entries {
                        if !is_plain(&entry.name) {
                            return Err(channel.error(ErrorKind::Untrustworthy));
                        }
                        let own = size_of::<Entry>() + entry.name.len() + entry.target.len();
                        size = size.saturating_add(own);
                    }
                    if size > MAX_LISTING {
                        return Err(channel.error(ErrorKind::TooLarge));
                    }
                    all.extend(entries);
                }
                Incoming::Raw(RawKind::End, _) => return Ok(all),
                _ => return Err(channel.error(ErrorKind::Untrustworthy)),
            }
        }
    }

    /// Makes a directory; with `parents` also what is missing above it, and it may be there.
    ///
    /// # Errors
    /// `Exists`, `NotFound`.
    pub fn make_dir(
        &self,
        path: impl AsRef<Path>,
        parents: bool,
        mode: u32,
        deadline: Instant,
    ) -> Result<(), Error> {
        let path = bytes(path.as_ref());
        let request = Request::MakeDir {
            path,
            parents,
            mode,
        };
        self.order("make a directory", &request, deadline)
    }

    /// Removes a file or an empty directory; with `recursive` a directory with all that is in it,
    /// but not across a mount.
    ///
    /// # Errors
    /// `NotFound`; `Guest` for a directory that is not empty.
    pub fn remove(
        &self,
        path: impl AsRef<Path>,
        recursive: bool,
        deadline: Instant,
    ) -> Result<(), Error> {
        let path = bytes(path.as_ref());
        self.order(
            "remove a file",
            &Request::Remove { path, recursive },
            deadline,
        )
    }

    /// Renames a file or directory, over one that is there.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn rename(
        &self,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        deadline: Instant,
    ) -> Result<(), Error> {
        let (from, to) = (bytes(from.as_ref()), bytes(to.as_ref()));
        self.order("rename a file", &Request::Rename { from, to }, deadline)
    }
}
