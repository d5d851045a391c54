//! What a worker inherits: variables, data, its name and number.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::Arc;

use polyfork::worker_threads::{
    Env, Worker, WorkerContext, WorkerOptions, env, get_environment_data, is_main_thread,
    remove_environment_data, set_environment_data, thread_id, thread_name,
};

/// Runs a function in a worker and returns what it says.
fn inside<T: Send + 'static>(
    options: WorkerOptions,
    look: impl FnOnce() -> T + Send + 'static,
) -> T {
    let worker = options.spawn(move |parent: WorkerContext<(), T>| {
        parent.try_post_message(look()).unwrap_or_else(|_| panic!("the parent is there"));
    });
    worker.unwrap().receive_blocking().expect("it speaks")
}

#[test]
fn a_worker_has_a_copy_of_the_variables_unless_they_are_shared_or_its_own() {
    env().set("WT_COPY", "before");
    let copied = inside(WorkerOptions::new(), || {
        let seen = env().get("WT_COPY");
        env().set("WT_COPY", "changed inside");
        seen
    });
    assert_eq!(copied.unwrap(), "before");
    assert_eq!(env().get("WT_COPY").unwrap(), "before", "a copy changes alone");
    let path = env().get("PATH");
    assert_eq!(path, std::env::var_os("PATH"), "as the process began");
    let shared = inside(WorkerOptions::new().env(Env::Share), || {
        env().set("WT_SHARED", "from inside");
        env().remove("WT_COPY")
    });
    assert_eq!(shared.unwrap(), "before");
    assert_eq!(env().get("WT_COPY"), None);
    assert_eq!(env().get("WT_SHARED").unwrap(), "from inside");
    let own: BTreeMap<OsString, OsString> = [("A".into(), "1".into())].into();
    let given = own.clone();
    let seen = inside(WorkerOptions::new().env(Env::Own(given)), || {
        let nested = inside(WorkerOptions::new(), || env().vars());
        assert_eq!(nested, env().vars(), "nested workers inherit from their parents");
        env().vars()
    });
    assert_eq!(seen, own);
}

#[test]
fn environment_data_is_inherited_as_it_was_at_the_start() {
    set_environment_data("wt-number", 1_u32);
    set_environment_data("wt-text", "text");
    let worker = Worker::<(), Option<Arc<u32>>>::spawn(|mut parent: WorkerContext<(), _>| {
        parent.receive_blocking();
        set_environment_data("wt-inside", ());
        parent.try_post_message(get_environment_data("wt-number")).unwrap();
        let nested = inside(WorkerOptions::new(), || get_environment_data("wt-number"));
        parent.try_post_message(nested).unwrap();
    });
    let mut worker = worker.unwrap();
    set_environment_data("wt-number", 2_u32);
    worker.try_post_message(()).unwrap();
    assert_eq!(worker.receive_blocking().unwrap().as_deref(), Some(&1));
    assert_eq!(worker.receive_blocking().unwrap().as_deref(), Some(&1));
    assert_eq!(get_environment_data::<u32>("wt-number").as_deref(), Some(&2));
    assert!(get_environment_data::<()>("wt-inside").is_none());
    assert!(get_environment_data::<u64>("wt-number").is_none(), "of another type");
    remove_environment_data("wt-text");
    assert!(inside(WorkerOptions::new(), || get_environment_data::<&str>("wt-text")).is_none());
}

#[test]
fn ids_increase_and_names_are_known_on_both_sides() {
    assert!(is_main_thread());
    assert_eq!((thread_id(), thread_name()), (0, None));
    let mut last = 0;
    for number in 0..5 {
        let name = format!("worker {number}");
        let worker = WorkerOptions::new().name(&name).spawn(
            |mut parent: WorkerContext<(), (u64, Option<String>, bool, Option<String>)>| {
                let system = std::thread::current().name().map(str::to_owned);
                let told = (thread_id(), thread_name(), is_main_thread(), system);
                parent.try_post_message(told).unwrap();
                parent.receive_blocking();
            },
        );
        let mut worker = worker.unwrap();
        let expected = (worker.thread_id(), Some(name.clone()), false, Some(name.clone()));
        assert_eq!(worker.receive_blocking(), Some(expected));
        assert!(worker.thread_id() > last);
        last = worker.thread_id();
        assert_eq!(worker.thread_name(), Some(name.as_str()));
    }
}

#[test]
fn start_up_data_moves_to_the_worker_with_ports_and_all() {
    use polyfork::worker_threads::{MessageChannel, MessagePort};
    type Data = (Vec<u8>, MessagePort<String, usize>);
    let MessageChannel { mut port1, port2 } = MessageChannel::<usize, String>::new();
    let worker = WorkerOptions::new().worker_data::<Data>((vec![1, 2, 3], port2)).spawn(
        |mut parent: WorkerContext<(), ()>| {
            assert!(parent.worker_data::<String>().is_none(), "of another type");
            let (bytes, mut port) = parent.worker_data::<Data>().expect("given");
            assert!(parent.worker_data::<Data>().is_none(), "taken");
            let text = port.receive_blocking().unwrap();
            port.try_post_message(text.len() + bytes.len()).unwrap();
        },
    );
    port1.try_post_message("four".to_owned()).unwrap();
    assert_eq!(port1.receive_blocking(), Some(7));
    assert!(worker.unwrap().join_blocking().success());
}

#[test]
fn the_working_directory_is_the_process_s_in_every_worker() {
    let here = std::env::current_dir().unwrap();
    assert_eq!(inside(WorkerOptions::new(), || std::env::current_dir().unwrap()), here);
}

#[test]
fn a_worker_runs_on_the_processors_it_was_given() {
    use rustix::thread::sched_getaffinity;
    let allowed = sched_getaffinity(None).unwrap();
    let one = (0..1024).find(|cpu| allowed.is_set(*cpu)).unwrap();
    let seen = inside(WorkerOptions::new().cpu_affinity([one]), || {
        let set = sched_getaffinity(None).unwrap();
        (0..1024).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>()
    });
    assert_eq!(seen, [one]);
    for impossible in [vec![], vec![usize::MAX], vec![1023]] {
        let options = WorkerOptions::new().cpu_affinity(impossible);
        let error = options.spawn(|_: WorkerContext<(), ()>| -> () { unreachable!() }).unwrap_err();
        assert!(error.to_string().contains("processors"), "{error}");
    }
}

#[test]
fn a_stack_is_as_large_as_asked_for() {
    fn deep(levels: u32) -> u32 {
        let here = std::hint::black_box([levels; 1024]);
        if levels == 0 { 0 } else { deep(levels - 1) + here[1023] / here[0] }
    }
    // More than the 2 MiB that a thread has unless said.
    let reached = inside(WorkerOptions::new().stack_size(256 << 20), || deep(20_000));
    assert_eq!(reached, 20_000);
}
