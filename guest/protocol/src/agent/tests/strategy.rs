//! Any message there can be, of moderate size.

use std::net::IpAddr;
use std::vec;
use std::vec::Vec;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use crate::agent::*;
use crate::{Id, Mac};

fn bytes() -> impl Strategy<Value = ByteString> {
    vec(any::<u8>(), 0..12)
}

fn user() -> impl Strategy<Value = User> {
    prop_oneof![
        bytes().prop_map(User::Name),
        any::<(u32, u32)>().prop_map(|(uid, gid)| User::Ids { uid, gid }),
    ]
}

fn env() -> impl Strategy<Value = Vec<EnvVar>> {
    let variable = (bytes(), option::of(bytes())).prop_map(|(name, value)| EnvVar { name, value });
    vec(variable, 0..4)
}

fn size() -> impl Strategy<Value = WindowSize> {
    any::<(u16, u16)>().prop_map(|(rows, columns)| WindowSize { rows, columns })
}

fn exec() -> impl Strategy<Value = Exec> {
    let first = (
        vec(bytes(), 0..4),
        option::of(bytes()),
        env(),
        option::of(user()),
        option::of(size()),
    );
    let second = (any::<(bool, bool, u64, u32)>(), select(Lifetime::ALL));
    (first, second).prop_map(
        |((argv, cwd, env, user, terminal), ((clean_env, input, limit, kept), lifetime))| Exec {
            argv,
            cwd,
            env,
            clean_env,
            user,
            terminal,
            input,
            time_limit_ms: limit,
            output_kept: kept,
            lifetime,
        },
    )
}

fn address() -> impl Strategy<Value = Address> {
    any::<(IpAddr, u8)>().prop_map(|(ip, prefix)| Address { ip, prefix })
}

fn link() -> impl Strategy<Value = Link> {
    let route =
        (address(), any::<(Option<IpAddr>, Option<u32>)>()).prop_map(|(to, (gateway, metric))| {
            Route {
                to,
                gateway,
                metric,
            }
        });
    (
        bytes(),
        any::<(Option<[u8; 6]>, Option<u32>, bool)>(),
        vec(address(), 0..3),
        vec(route, 0..3),
    )
        .prop_map(|(name, (mac, mtu, replace), addresses, routes)| Link {
            name,
            mac: mac.map(Mac),
            mtu,
            replace,
            addresses,
            routes,
        })
}

fn settings() -> impl Strategy<Value = Settings> {
    (
        option::of(bytes()),
        option::of(any::<[u8; 16]>()),
        env(),
        vec(link(), 0..3),
        any::<Vec<IpAddr>>(),
    )
        .prop_map(|(hostname, machine_id, env, links, resolvers)| Settings {
            hostname,
            machine_id: machine_id.map(Id),
            env,
            links,
            resolvers,
        })
}

fn identity() -> impl Strategy<Value = Identity> {
    (any::<([u8; 16], u64, u32)>(), bytes(), settings()).prop_map(
        |((generation, unix_ns, hook_limit_ms), seed, settings)| Identity {
            generation: Generation(generation),
            unix_ns,
            seed,
            settings,
            hook_limit_ms,
        },
    )
}

pub(super) fn request() -> BoxedStrategy<Request> {
    let number = any::<u64>;
    prop_oneof![
        any::<(u16, u16, [u8; 16])>().prop_map(|(oldest, newest, generation)| Request::Hello {
            oldest,
            newest,
            generation: Generation(generation),
        }),
        identity().prop_map(|identity| Request::Identify { identity }),
        settings().prop_map(|settings| Request::Configure { settings }),
        vec(bytes(), 0..3).prop_map(|paths| Request::Metrics { paths }),
        number().prop_map(|unix_ns| Request::SetClock { unix_ns }),
        select(PowerAction::ALL).prop_map(|action| Request::Power { action }),
        select(std::vec![
            Request::Sync {},
            Request::Ping {},
            Request::Jobs {}
        ]),
        exec().prop_map(|command| Request::Exec { command }),
        (number(), number()).prop_map(|(job, from)| Request::Attach {
            job: JobId(job),
            from
        }),
        (number(), any::<(u8, bool)>()).prop_map(|(job, (signal, group))| Request::Signal {
            job: JobId(job),
            signal,
            group,
        }),
        (number(), size()).prop_map(|(job, size)| Request::Resize {
            job: JobId(job),
            size
        }),
        number().prop_map(|job| Request::Forget { job: JobId(job) }),
        (bytes(), number(), number()).prop_map(|(path, offset, len)| Request::Read {
            path,
            offset,
            len
        }),
        (
            bytes(),
            select(WriteMode::ALL),
            any::<(Option<u32>, bool)>(),
            option::of(user())
        )
            .prop_map(|(path, how, (mode, sync), owner)| Request::Write {
                path,
                how,
                mode,
                owner,
                sync,
            }),
        (bytes(), any::<bool>()).prop_map(|(path, follow)| Request::Stat { path, follow }),
        bytes().prop_map(|path| Request::List { path }),
        (bytes(), any::<(bool, u32)>()).prop_map(|(path, (parents, mode))| Request::MakeDir {
            path,
            parents,
            mode
        }),
        (bytes(), any::<bool>()).prop_map(|(path, recursive)| Request::Remove { path, recursive }),
        (bytes(), bytes()).prop_map(|(from, to)| Request::Rename { from, to }),
    ]
    .boxed()
}

fn exit() -> impl Strategy<Value = Exit> {
    (select(EndState::ALL), any::<(i32, bool)>()).prop_map(|(state, (value, timed_out))| Exit {
        state,
        value,
        timed_out,
    })
}

fn job() -> impl Strategy<Value = JobInfo> {
    (
        any::<(u64, u32, u64, bool, u64, u64)>(),
        bytes(),
        select(Lifetime::ALL),
        option::of(exit()),
    )
        .prop_map(
            |((job, pid, started, terminal, first, next), title, lifetime, exit)| JobInfo {
                job: JobId(job),
                pid,
                title,
                started_unix_ns: started,
                terminal,
                lifetime,
                first,
                next,
                exit,
            },
        )
}

fn entry() -> impl Strategy<Value = Entry> {
    (
        bytes(),
        select(EntryKind::ALL),
        any::<(u32, u32, u32, u64, u64)>(),
        bytes(),
    )
        .prop_map(
            |(name, kind, (mode, uid, gid, size, modified), target)| Entry {
                name,
                kind,
                mode,
                uid,
                gid,
                size,
                modified_unix_ns: modified,
                target,
            },
        )
}

fn step() -> impl Strategy<Value = Step> {
    (
        select(StepKind::ALL),
        bytes(),
        select(StepResult::ALL),
        any::<(i32, u64)>(),
        bytes(),
    )
        .prop_map(|(kind, subject, result, (errno, micros), detail)| Step {
            kind,
            subject,
            result,
            errno,
            detail,
            micros,
        })
}

fn metrics() -> impl Strategy<Value = Metrics> {
    let disk = (bytes(), any::<(u64, u64, u64, u64)>()).prop_map(
        |(path, (size, available, files, files_free))| Disk {
            path,
            size,
            available,
            files,
            files_free,
        },
    );
    let memory =
        any::<[u64; 6]>().prop_map(|[total, available, free, cached, swap_total, swap_free]| {
            Memory {
                total,
                available,
                free,
                cached,
                swap_total,
                swap_free,
            }
        });
    (
        any::<(u64, u64, u32, u32, u32, u32)>(),
        memory,
        vec(any::<u32>(), 0..4),
        vec(disk, 0..3),
    )
        .prop_map(
            |((uptime, unix_ns, cpus, tasks, running, jobs), memory, load, disks)| Metrics {
                uptime_ms: uptime,
                unix_ns,
                memory,
                load_milli: load,
                cpus,
                tasks,
                running,
                jobs,
                disks,
            },
        )
}

pub(super) fn reply() -> BoxedStrategy<Reply> {
    prop_oneof![
        any::<(u16, [u8; 16])>().prop_map(|(version, generation)| Reply::Hello {
            version,
            generation: Generation(generation),
        }),
        (any::<([u8; 16], u64)>(), vec(step(), 0..4)).prop_map(|((generation, micros), steps)| {
            Reply::Ready {
                report: Report {
                    generation: Generation(generation),
                    steps,
                    micros,
                },
            }
        }),
        metrics().prop_map(|metrics| Reply::Metrics { metrics }),
        Just(Reply::Done {}),
        any::<(u64, u32)>().prop_map(|(job, pid)| Reply::Started {
            job: JobId(job),
            pid
        }),
        (job(), any::<u64>()).prop_map(|(info, from)| Reply::Attached { info, from }),
        exit().prop_map(|exit| Reply::Exited { exit }),
        vec(job(), 0..4).prop_map(|jobs| Reply::Jobs { jobs }),
        any::<u64>().prop_map(|size| Reply::Opened { size }),
        any::<u64>().prop_map(|bytes| Reply::Finished { bytes }),
        entry().prop_map(|entry| Reply::Stat { entry }),
        vec(entry(), 0..4).prop_map(|entries| Reply::Entries { entries }),
        (select(ErrorCode::ALL), any::<i32>(), bytes()).prop_map(|(code, errno, detail)| {
            Reply::Refused {
                refusal: Refusal {
                    code,
                    errno,
                    detail,
                },
            }
        }),
    ]
    .boxed()
}
