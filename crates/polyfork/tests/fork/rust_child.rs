//! A Node parent, whose child is this program.

use polyfork::channel::Encoding;
use polyfork::child_process::Command;

use crate::support::{Node, app, on_node};

on_node!(
    values_come_back_unchanged,
    eight_mebibytes_arrive_whole,
    many_messages_arrive_in_order,
    disconnect_by_the_child_loses_nothing,
    listening_server_is_used_in_the_child,
    connections_are_used_and_counted_until_closed,
    udp_socket_is_used_in_the_child,
    handles_of_the_child_are_used_in_the_parent,
    script_asks_and_the_child_answers_or_refuses,
    killed_child_ends_the_channel,
    grandchild_does_not_inherit_the_channel,
);

async fn run(node: Node, play: &str) {
    let encoding = if node.encoding == Encoding::Advanced { "advanced" } else { "json" };
    let mut command = Command::new(&node.path);
    command.arg(app("parent.cjs")).arg(play).arg(std::env::current_exe().unwrap()).arg(encoding);
    let exit = command.spawn().unwrap().wait().await.unwrap();
    assert!(exit.success(), "{play}: {exit:?}");
}

async fn values_come_back_unchanged(node: Node) {
    run(node, "echo").await;
}

async fn eight_mebibytes_arrive_whole(node: Node) {
    run(node, "large").await;
}

async fn many_messages_arrive_in_order(node: Node) {
    run(node, "flood").await;
}

async fn disconnect_by_the_child_loses_nothing(node: Node) {
    run(node, "leaves").await;
}

async fn listening_server_is_used_in_the_child(node: Node) {
    run(node, "server").await;
}

async fn connections_are_used_and_counted_until_closed(node: Node) {
    run(node, "sockets").await;
}

async fn udp_socket_is_used_in_the_child(node: Node) {
    run(node, "udp").await;
}

async fn handles_of_the_child_are_used_in_the_parent(node: Node) {
    run(node, "gives").await;
}

async fn script_asks_and_the_child_answers_or_refuses(node: Node) {
    run(node, "requests").await;
}

async fn killed_child_ends_the_channel(node: Node) {
    run(node, "killed").await;
}

async fn grandchild_does_not_inherit_the_channel(node: Node) {
    run(node, "environment").await;
}
