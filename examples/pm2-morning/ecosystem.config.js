// Two apps, as PM2 has them. `polyfork start` in this folder starts both; `polyfork check` tells what becomes of each key.
module.exports = {
  apps: [
    {
      name: 'shop',
      script: 'shop.js',
      instances: 2,
      exec_mode: 'cluster',
      wait_ready: true,
      listen_timeout: 10000,
      kill_timeout: 5000,
      max_memory_restart: '300M',
      env: { PORT: process.env.SHOP_PORT || 3000, NODE_ENV: 'development' },
      env_production: { NODE_ENV: 'production' },
    },
    {
      name: 'mail',
      script: 'mail.js',
      shutdown_with_message: true,
      out_file: '/var/log/mail.log',
    },
  ],
};
