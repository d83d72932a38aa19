//! The host's side of the command stream.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use offshoot_protocol::frame::{self, HEADER, Header, MAX_FRAME};
use offshoot_protocol::{
    CONTROL_PORT, OLDEST_VERSION, Outcome, Refusal, Reply, Request, State, VERSION, WireError,
};

/// Why a request got no good answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The stream failed, ended, or did not move within its time-out.
    #[error("the stream to the pilot failed while {during}")]
    Stream {
        /// What was being done.
        during: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The host side of the vsock did not accept the connection.
    #[error("no connection to port {port} of the pilot until the deadline")]
    NoConnection {
        /// The port in the guest.
        port: u32,
        /// The last failure.
        #[source]
        source: io::Error,
    },
    /// The pilot sent something that is not an answer.
    #[error("the pilot's answer can't be read")]
    BadAnswer(#[source] WireError),
    /// The pilot answered something else than what was asked for.
    #[error("the pilot gave an answer of kind {kind} with tag {tag}, which nobody waits for")]
    Unexpected {
        /// The answer's kind.
        kind: u16,
        /// The answer's tag.
        tag: u32,
    },
    /// The pilot did not do it.
    #[error("the pilot refused the request")]
    Refused(#[source] Refusal),
}

impl ClientError {
    fn stream(during: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Stream { during, source }
    }
}

/// A connection to a pilot, blocking. One request at a time; every read and write is bounded by
/// the stream's own time-outs, which [`connect`](PilotClient::connect) sets. After an error
/// other than [`ClientError::Refused`] the connection is of no use any more.
#[derive(Debug)]
pub struct PilotClient<S> {
    stream: S,
    tag: u32,
}

impl PilotClient<UnixStream> {
    /// Connects to the command port through the host side of a vsock: a Unix socket that takes
    /// `CONNECT <port>` and answers `OK <port>`. Tries until the deadline while nobody listens,
    /// and gives each later read and write ten seconds (see [`set_timeout`](Self::set_timeout)).
    ///
    /// # Errors
    /// `NoConnection` when the deadline passes, or what the handshake ends with.
    pub fn connect(path: &Path, deadline: Instant) -> Result<Self, ClientError> {
        let stream = connect_vsock(path, CONTROL_PORT, deadline)?;
        let mut client = Self::over(stream)?;
        client.set_timeout(Duration::from_secs(10))?;
        Ok(client)
    }

    /// How long a read or write may wait from now on.
    ///
    /// # Errors
    /// `Stream` when the socket does not take it, for a zero duration say.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), ClientError> {
        let failed = ClientError::stream("setting the time-out");
        self.stream
            .set_read_timeout(Some(timeout))
            .and_then(|()| self.stream.set_write_timeout(Some(timeout)))
            .map_err(failed)
    }
}

/// Connects to any port of a guest through the host side of its vsock. The stream's time-outs
/// are what is left until the deadline.
///
/// # Errors
/// `NoConnection` when nobody accepts until the deadline.
pub fn connect_vsock(path: &Path, port: u32, deadline: Instant) -> Result<UnixStream, ClientError> {
    offshoot_protocol::connect_vsock(path, port, deadline)
        .map_err(|source| ClientError::NoConnection { port, source })
}

impl<S: Read + Write> PilotClient<S> {
    /// Settles the version over a stream that leads to the command port.
    ///
    /// # Errors
    /// Whatever the handshake ends with.
    pub fn over(stream: S) -> Result<Self, ClientError> {
        let mut client = Self { stream, tag: 0 };
        let hello = Request::Hello {
            oldest: OLDEST_VERSION,
            newest: VERSION,
        };
        match client.ask(&hello)? {
            Reply::Hello { version } if (OLDEST_VERSION..=VERSION).contains(&version) => Ok(client),
            other => Err(client.unexpected(&other)),
        }
    }

    /// The stream.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    fn unexpected(&self, reply: &Reply) -> ClientError {
        ClientError::Unexpected {
            kind: reply.kind(),
            tag: self.tag,
        }
    }

    /// Sends a request that has no answer (`Crash`, `Reboot`).
    ///
    /// # Errors
    /// `Stream` when it can't be sent.
    pub fn tell(&mut self, request: &Request) -> Result<(), ClientError> {
        let mut bytes = [0; MAX_FRAME];
        self.tag = self.tag.wrapping_add(1);
        let len =
            frame::encode_request(&mut bytes, request, self.tag).map_err(ClientError::BadAnswer)?;
        let request = bytes.get(..len).unwrap_or_default();
        self.stream
            .write_all(request)
            .map_err(ClientError::stream("sending a request"))
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// `Refused` when the pilot did not do it; anything else ends the connection.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.tell(request)?;
        let during = "waiting for an answer";
        let mut header = [0; HEADER];
        self.stream
            .read_exact(&mut header)
            .map_err(ClientError::stream(during))?;
        let header = Header::decode(&header).map_err(ClientError::BadAnswer)?;
        let mut payload = vec![0; header.len];
        self.stream
            .read_exact(&mut payload)
            .map_err(ClientError::stream(during))?;
        if header.tag != self.tag {
            return Err(ClientError::Unexpected {
                kind: header.kind,
                tag: header.tag,
            });
        }
        match Reply::decode(header.kind, &payload).map_err(ClientError::BadAnswer)? {
            Reply::Refused { code, detail } => Err(ClientError::Refused(Refusal { code, detail })),
            reply => Ok(reply),
        }
    }

    /// Asks for a report.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn state(&mut self) -> Result<State, ClientError> {
        match self.ask(&Request::State {})? {
            Reply::State { state } => Ok(state),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Asks for a piece of work that has an outcome. That nothing differed is for the caller to
    /// see from [`Outcome::bad`].
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn work(&mut self, request: &Request) -> Result<Outcome, ClientError> {
        match self.ask(request)? {
            Reply::Outcome { outcome } => Ok(outcome),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Asks for something that is only done or not.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn order(&mut self, request: &Request) -> Result<(), ClientError> {
        match self.ask(request)? {
            Reply::Done {} => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }
}
