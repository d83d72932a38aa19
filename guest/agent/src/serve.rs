//! One connection: hello, one request, its answer.

use std::sync::Arc;
use std::time::Duration;

use offshoot_protocol::agent::{
    ErrorCode, Generation, OLDEST_VERSION, Refusal, Reply, Request, VERSION,
};

use crate::connection::{Connection, Trouble};
use crate::failure::refusal;
use crate::files::{self, Target};
use crate::{Agent, clock, identity, init, jobs, metrics};

/// How long hello and request may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves a connection to its end.
pub(crate) fn serve(agent: &Arc<Agent>, number: u64, connection: &Arc<Connection>) {
    let served = hello(agent, connection).and_then(|meant| {
        let request = connection.request().map_err(Some)?;
        answer(agent, number, connection, meant, request)
            .map_err(|refusal| Some(Trouble::Nonsense(refusal)))
    });
    match served {
        Err(Some(Trouble::Nonsense(refusal))) => {
            if connection.refuse(refusal).is_ok() {
                connection.linger();
            }
        }
        Err(_) => {}
        Ok(()) => connection.linger(),
    }
}

/// Settles the version and says which generation is meant; `None` when the host wants nothing.
fn hello(agent: &Agent, connection: &Connection) -> Result<Generation, Option<Trouble>> {
    let broken = |error: std::io::Error| Some(Trouble::from(error));
    connection
        .set_read_timeout(Some(PATIENCE))
        .map_err(broken)?;
    let (oldest, newest, generation) = match connection.request() {
        Ok(Request::Hello {
            oldest,
            newest,
            generation,
        }) => (oldest, newest, generation),
        Ok(other) => {
            let detail = format!("{} before Hello", other.name());
            return Err(Some(Trouble::Nonsense(refusal(
                ErrorCode::NoHello,
                &detail,
            ))));
        }
        Err(Trouble::Closed) => return Err(None),
        Err(trouble) => return Err(Some(trouble)),
    };
    let version = newest.min(VERSION);
    if version < oldest.max(OLDEST_VERSION) {
        let detail = format!("this agent speaks versions {OLDEST_VERSION} to {VERSION}");
        return Err(Some(Trouble::Nonsense(refusal(
            ErrorCode::Version,
            &detail,
        ))));
    }
    let hello = Reply::Hello {
        version,
        generation: agent.gate.generation(),
    };
    connection.reply(&hello).map_err(broken)?;
    Ok(generation)
}

fn answer(
    agent: &Arc<Agent>,
    number: u64,
    connection: &Arc<Connection>,
    meant: Generation,
    request: Request,
) -> Result<(), Refusal> {
    // What the agent becomes is settled before it does anything else.
    if !matches!(request, Request::Identify { .. }) {
        agent.gate.enter(meant)?;
    }
    let reply = match request {
        Request::Hello { .. } => return Err(refusal(ErrorCode::Malformed, "a second Hello")),
        Request::Identify { identity } => Reply::Ready {
            report: identity::identify(agent, number, &identity)?,
        },
        Request::Configure { settings } => Reply::Ready {
            report: identity::configure(agent, &settings),
        },
        Request::Metrics { paths } => Reply::Metrics {
            metrics: metrics::collect(agent, &paths)?,
        },
        Request::SetClock { unix_ns } => {
            clock::step(unix_ns)?;
            Reply::Done {}
        }
        Request::Sync {} => {
            rustix::fs::sync();
            Reply::Done {}
        }
        Request::Ping {} => Reply::Done {},
        Request::Power { action } => {
            let stop = init::stopper(agent, action)?;
            let _ = connection.reply(&Reply::Done {});
            connection.linger();
            return stop.run(agent);
        }
        Request::Exec { command } => return jobs::exec(agent, connection, &command),
        Request::Attach { job, from } => return jobs::attach(agent, connection, job, from),
        Request::Jobs {} => Reply::Jobs {
            jobs: agent.jobs.list(),
        },
        Request::Signal { job, signal, group } => {
            agent.jobs.signal(agent, job, signal, group)?;
            Reply::Done {}
        }
        Request::Resize { job, size } => {
            agent.jobs.resize(job, size)?;
            Reply::Done {}
        }
        Request::Forget { job } => {
            agent.jobs.forget(job)?;
            Reply::Done {}
        }
        Request::Read { path, offset, len } => return files::read(connection, &path, offset, len),
        Request::Write {
            path,
            how,
            mode,
            owner,
            sync,
        } => {
            let target = Target {
                path,
                how,
                mode,
                owner,
                sync,
            };
            return files::write(connection, &target);
        }
        Request::Stat { path, follow } => Reply::Stat {
            entry: files::stat(&path, follow)?,
        },
        Request::List { path } => return files::list(connection, &path),
        Request::MakeDir {
            path,
            parents,
            mode,
        } => {
            files::make_dir(&path, parents, mode)?;
            Reply::Done {}
        }
        Request::Remove { path, recursive } => {
            files::remove(&path, recursive)?;
            Reply::Done {}
        }
        Request::Rename { from, to } => {
            files::rename(&from, &to)?;
            Reply::Done {}
        }
        other => {
            let detail = format!("{} is not served here", other.name());
            return Err(refusal(ErrorCode::Malformed, &detail));
        }
    };
    if let Err(error) = connection.reply(&reply)
        && error.kind() == std::io::ErrorKind::Other
    {
        return Err(refusal(ErrorCode::Invalid, "the answer would be too long"));
    }
    Ok(())
}
